"""Muon's update against the singular value decomposition, and against torch's own."""

import pytest
import torch
from torch.testing import assert_close

from asymlift.maths.muon import adamw_scale, orthogonalize

SHAPES = [(24, 24), (17, 40), (40, 17)]


@pytest.mark.parametrize("shape", SHAPES)
def test_singular_values_come_near_one_and_directions_stay(shape):
    u, s, vh = torch.linalg.svd(torch.randn(shape, dtype=torch.float64), full_matrices=False)
    s = torch.logspace(0, 1.5, len(s), dtype=torch.float64)

    made = orthogonalize((u * s) @ vh)

    inside = u.T @ made @ vh.T
    assert_close(inside, torch.diag(inside.diagonal()))
    assert inside.diagonal().min() > 0.3 and inside.diagonal().max() < 1.3
    assert_close(u @ inside @ vh, made)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("factor", [1e-20, 1.0, 1e20])
def test_the_size_of_the_matrix_does_not_matter(shape, factor):
    matrix = torch.randn(shape, dtype=torch.float64)
    assert_close(orthogonalize(factor * matrix, floor=0.0), orthogonalize(matrix))


def test_a_matrix_of_zeros_stays_zero():
    assert torch.equal(orthogonalize(torch.zeros(3, 5)), torch.zeros(3, 5))


@pytest.mark.parametrize("shape", SHAPES)
def test_an_update_is_that_of_torch_with_adamws_size(shape):
    """torch computes in bfloat16 and adds the averages up; the first step shows both."""
    weight = torch.nn.Parameter(torch.zeros(shape))
    weight.grad = torch.randn(shape)
    torch.optim.Muon(
        [weight], lr=1.0, weight_decay=0.0, nesterov=False, adjust_lr_fn="match_rms_adamw"
    ).step()

    ours = adamw_scale(*shape) * orthogonalize(weight.grad)

    assert_close(-weight.detach(), ours, rtol=0, atol=0.03 * float(ours.abs().max()))


@pytest.mark.parametrize("shape", SHAPES)
def test_an_entry_of_an_orthogonal_matrix_gets_the_size_of_an_adamw_update(shape):
    u, _, vh = torch.linalg.svd(torch.randn(shape, dtype=torch.float64), full_matrices=False)
    size = (adamw_scale(*shape) * (u @ vh)).square().mean().sqrt()
    assert_close(size, torch.tensor(0.2, dtype=torch.float64))
