import pytest
import torch
from torch import Tensor, nn
from torch.testing import assert_close

from asymlift.maths.color import ColorCode
from asymlift.maths.guidance import clamp_denoised, guide, renormalised_guidance

SHAPE = (3, 3, 4, 6)
OKLAB = ColorCode("oklab", (0.56, 0.0, 0.01), 0.16)


def inner(a: Tensor, b: Tensor) -> Tensor:
    """One inner product per sample."""
    return (a * b).flatten(1).sum(1)


@pytest.mark.parametrize("orthogonal", [0.0, 1.0])
def test_guidance_of_strength_one_is_the_positive_branch(orthogonal):
    u_pos, u_neg, x0_pos = torch.randn(3, *SHAPE)
    assert torch.equal(guide(u_pos, u_neg, x0_pos, scale=1.0, orthogonal=orthogonal), u_pos)


def test_without_the_orthogonal_part_it_is_classifier_free_guidance():
    u_pos, u_neg, x0_pos = torch.randn(3, *SHAPE)
    u = guide(u_pos, u_neg, x0_pos, scale=4.0, orthogonal=0.0)
    assert_close(u, u_neg + 4 * (u_pos - u_neg))


def test_renormalised_guidance_turns_tokens_and_keeps_their_length():
    v_pos, v_neg = torch.randn(2, 3, 5, 7)
    v = renormalised_guidance(v_pos, v_neg, scale=4.0)
    assert_close(v.norm(dim=-1), v_pos.norm(dim=-1))
    plain = v_neg + 4 * (v_pos - v_neg)
    along = nn.functional.cosine_similarity(v, plain, dim=-1)
    assert_close(along, torch.ones(3, 5))


@pytest.mark.parametrize("scale", [0.5, 2.3, 4.0])
def test_the_orthogonal_correction_never_moves_a_sample_along_its_image(scale):
    u_pos, u_neg, x0_pos = torch.randn(3, *SHAPE)
    u = guide(u_pos, u_neg, x0_pos, scale=scale, orthogonal=1.0)
    assert_close(inner(u - u_pos, x0_pos), torch.zeros(3), rtol=0, atol=1e-12)


@pytest.mark.parametrize("orthogonal", [0.25, 1.0])
def test_a_share_of_the_component_along_the_image_is_removed_and_nothing_else(orthogonal):
    u_pos, u_neg, x0_pos = torch.randn(3, *SHAPE)
    u = guide(u_pos, u_neg, x0_pos, scale=4.0, orthogonal=orthogonal)
    for sample in range(len(u)):
        b, x0 = 3 * (u_pos - u_neg)[sample], x0_pos[sample]
        b = b - orthogonal * (b * x0).sum() / (x0 * x0).sum() * x0
        assert_close(u[sample], u_pos[sample] + b)


def test_what_is_orthogonal_already_is_kept():
    u_pos, u_neg, x0_pos = torch.zeros(3, 1, 3, 2, 2)
    u_pos[0, 0], x0_pos[0, 1] = 1.0, 1.0
    u = guide(u_pos, u_neg, x0_pos, scale=4.0, orthogonal=1.0)
    assert_close(u, 4 * u_pos)


def test_a_black_image_does_not_blow_the_correction_up():
    """The mean energy of the image is floored: at 1e-6, by default."""
    u_pos, u_neg = torch.randn(2, *SHAPE)
    x0_pos = torch.full(SHAPE, 1e-4)  # mean energy 1e-8
    correction = 3 * (u_pos - u_neg)

    u = guide(u_pos, u_neg, x0_pos, scale=4.0, orthogonal=1.0)

    along = (correction * 1e-4).mean((1, 2, 3), keepdim=True) / 1e-6
    assert_close(u, u_pos + correction - along * 1e-4)


def test_clamping_leaves_images_in_range_alone():
    x0, eps = OKLAB.encode(torch.rand(SHAPE) * 2 - 1), torch.randn(SHAPE)
    sigma = torch.tensor(0.3)
    u, x_t = eps - x0, (1 - sigma) * x0 + sigma * eps

    clamped = clamp_denoised(u, x_t, sigma, decode=OKLAB.decode, encode=OKLAB.encode, floor=1e-4)

    assert_close(clamped, u)


def test_clamping_aims_at_the_nearest_picture():
    """Decode, clamp to [-1, 1], encode: with plain RGB the predicted image itself is clamped."""
    u, x_t, sigma = torch.randn(SHAPE), 2 * torch.randn(SHAPE), torch.tensor(0.3)
    decode, encode = (lambda x: 2 * x), (lambda image: image / 2)

    clamped = clamp_denoised(u, x_t, sigma, decode=decode, encode=encode, floor=1e-4)

    assert_close(x_t - sigma * clamped, (x_t - sigma * u).clamp(-0.5, 0.5))


def test_clamping_divides_by_the_noise_level_but_never_by_less_than_the_floor():
    u, x_t = torch.randn(SHAPE), torch.randn(SHAPE) / 10
    sigma = torch.tensor([0.5, 1e-5, 0.0]).view(3, 1, 1, 1)

    clamped = clamp_denoised(u, x_t, sigma, decode=lambda x: x, encode=lambda x: x, floor=1e-4)

    x0_hat = (x_t - sigma * u).clamp(-1, 1)
    expected = (x_t - x0_hat) / torch.tensor([0.5, 1e-4, 1e-4]).view(3, 1, 1, 1)
    assert_close(clamped, expected)
