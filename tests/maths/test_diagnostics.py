import pytest
import torch
from torch.testing import assert_close

from asymlift.maths.diagnostics import (
    covariance_trace,
    error_energies,
    last_map_gradients,
    sums_by_level,
)
from asymlift.maths.loss import control_variate


def noise(*shape: int, seed: int = 0) -> torch.Tensor:
    g = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=g, dtype=torch.float64)


def test_the_energy_that_is_left_is_that_of_each_colour_less_its_share():
    x0, x0_hat, x0_low, x0_low_hat = (noise(2, 3, 12, seed=n) for n in range(4))
    c = control_variate(x0, x0_hat, x0_low, x0_low_hat)
    energy, left = error_energies(x0, x0_hat, x0_low, x0_low_hat, c)
    for b in range(2):
        expected = 0.0
        for n in range(3):
            for colour in range(3):
                pixels = slice(4 * colour, 4 * colour + 4)
                full = (x0 - x0_hat)[b, n, pixels]
                rest = full - c[b, n, colour, 0] * (x0_low - x0_low_hat)[b, n, pixels]
                expected += float(rest @ rest)
        assert float(left[b]) == pytest.approx(expected)
    assert_close(energy, (x0 - x0_hat).square().sum((1, 2)))
    assert (left <= energy).all()  # c is the least-squares share, within its clamp


def test_values_are_summed_by_their_level_and_one_is_in_the_last_bin():
    values, weight = torch.tensor([1.0, 2.0, 4.0, 8.0, torch.nan]), torch.tensor([1, 1, 0, 1, 1])
    sigma = torch.tensor([0.0, 0.24, 0.3, 1.0, 0.6])
    sums, counts = sums_by_level(values, weight, sigma, 4)
    assert sums[[0, 1, 3]].tolist() == [3.0, 0.0, 8.0] and sums[2].isnan()
    assert counts.tolist() == [2.0, 0.0, 1.0, 1.0]


def test_the_trace_of_the_covariance_is_that_of_all_gradients_side_by_side():
    h, g = noise(5, 4, 3), noise(5, 4, 2, seed=1)
    weight = torch.tensor([1.0, 1.0, 0.0, 1.0, 1.0], dtype=torch.float64)
    squares, total = last_map_gradients(h, g, weight)
    each = torch.einsum("bnd,bnf->bdf", g, h)[weight > 0]
    assert_close(squares, each.square().sum())
    assert_close(total, each.sum(0))
    trace = covariance_trace(float(squares), float(total.square().sum()), 4)
    assert trace == pytest.approx(float(each.flatten(1).T.cov().trace()))
