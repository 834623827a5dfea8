"""The vectorised loss against the published formulas, written out as loops over plain numbers."""

import math

import pytest
import torch
from torch import Tensor
from torch.testing import assert_close

from asymlift.maths.loss import (
    control_variate,
    corrected_target,
    flow_loss,
    low_noise_weight,
    perceptual_gate,
    perceptual_loss,
)
from asymlift.maths.patches import tokens_to_image

B, GRID, PATCH = 4, (2, 3), 2
N, D = 6, 12
SIGMA = torch.tensor([0.9, 0.4, 0.02, 0.0], dtype=torch.float64)


@pytest.fixture
def branches() -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """x0, x0_hat, x0_low, x0_low_hat, related so that c falls below 0, inside, and above 1."""
    x0, x0_low, error, shared = torch.randn(4, B, N, D)
    gain = torch.linspace(-1, 2, N).view(1, N, 1)
    return x0, x0 - gain * shared - error / 2, x0_low, x0_low - shared


def slow_c(x0: Tensor, x0_hat: Tensor, x0_low: Tensor, x0_low_hat: Tensor) -> Tensor:
    c = torch.zeros(B, N, 3, 1)
    for b in range(B):
        for n in range(N):
            for color in range(3):
                dot, energy = 0.0, 0.0
                for pixel in range(PATCH**2):
                    at = (b, n, color * PATCH**2 + pixel)
                    low = float(x0_low[at] - x0_low_hat[at])
                    dot += float(x0[at] - x0_hat[at]) * low / PATCH**2
                    energy += low**2 / PATCH**2
                c[b, n, color, 0] = min(max(dot / max(energy, 1e-4), 0.0), 1.0)
    return c


def slow_w(h: float) -> list[float]:
    return [(1 - x) ** 2 / ((1 - x) ** 2 + (h * x) ** 2) for x in SIGMA.tolist()]


def test_the_control_variate_is_one_clamped_regression_per_patch_and_color(branches):
    c = control_variate(*branches)
    assert c.shape == (B, N, 3, 1)
    assert_close(c, slow_c(*branches))
    assert c.min() == 0
    assert c.max() == 1
    assert ((c > 0) & (c < 1)).any()


def test_a_reference_without_error_takes_nothing_away():
    x0, x0_hat, x0_low = torch.randn(3, B, N, D)
    assert torch.equal(control_variate(x0, x0_hat, x0_low, x0_low), torch.zeros(B, N, 3, 1))


def test_the_mean_energy_of_the_reference_error_is_floored():
    """Both errors 1e-3 everywhere: <full, low> = <low, low> = 1e-6, against 1e-4 by default."""
    x0 = torch.randn(B, N, D)
    c = control_variate(x0, x0 - 1e-3, x0, x0 - 1e-3)
    assert_close(c, torch.full((B, N, 3, 1), 0.01))
    c = control_variate(x0, x0 - 1e-3, x0, x0 - 1e-3, floor=1e-5)
    assert_close(c, torch.full((B, N, 3, 1), 0.1))


@pytest.mark.parametrize("h", [0.3, 1.0])
def test_the_weight_falls_from_one_at_no_noise_to_zero_at_pure_noise(h):
    assert_close(low_noise_weight(SIGMA, h), torch.tensor(slow_w(h)))
    assert low_noise_weight(torch.tensor([0.0, 1.0]), h).tolist() == [1.0, 0.0]


def test_the_target_moves_by_what_both_branches_got_wrong(branches):
    x0, _, x0_low, x0_low_hat = branches
    c, w = slow_c(*branches), slow_w(0.3)

    target = corrected_target(x0, x0_low, x0_low_hat, c, torch.tensor(w))

    for b in range(B):
        for n in range(N):
            for i in range(D):
                at = (b, n, i)
                low = float(x0_low[at] - x0_low_hat[at])
                expected = float(x0[at]) - (1 - w[b]) * float(c[b, n, i // PATCH**2, 0]) * low
                assert float(target[at]) == pytest.approx(expected, abs=1e-12)


def test_the_flow_loss_is_half_the_weighted_squared_velocity_error(branches):
    target, x0_hat, *_ = branches
    expected = []
    for b, sigma in enumerate(SIGMA.tolist()):
        squares = [float(x) ** 2 for x in (x0_hat[b] - target[b]).flatten()]
        expected.append(0.5 * 10 * sum(squares) / len(squares) / max(sigma, 0.05) ** 2)
    loss = flow_loss(x0_hat, target, SIGMA, weight=10, sigma_clamp=0.05)
    assert_close(loss, torch.tensor(expected))


def test_the_gate_is_the_root_mean_square_over_colors(branches):
    c = slow_c(*branches)
    gate = perceptual_gate(c)
    for b in range(B):
        for n in range(N):
            red, green, blue = c[b, n, :, 0].tolist()
            expected = math.sqrt((red**2 + green**2 + blue**2) / 3)
            assert float(gate[b, n]) == pytest.approx(expected, abs=1e-12)


def test_the_perceptual_loss_weighs_every_pixel_by_the_gate_of_its_patch():
    distance, gate, w = torch.rand(B, 1, 4, 6), torch.rand(B, N), torch.tensor(slow_w(0.3))
    expected = []
    for b, sigma in enumerate(SIGMA.tolist()):
        total = 0.0
        for row in range(4):
            for column in range(6):
                cell = row // PATCH * GRID[1] + column // PATCH
                total += float(distance[b, 0, row, column]) * float(gate[b, cell])
        expected.append(0.7 * total / 24 * float(w[b]) / max(sigma, 0.05) ** 2)

    loss = perceptual_loss(distance, gate, w, SIGMA, GRID, PATCH, weight=0.7, sigma_clamp=0.05)

    assert_close(loss, torch.tensor(expected))


def test_gradients_flow_through_the_prediction_alone(branches):
    """Target and gate are constants: the published stop-gradient, and no graph of the reference."""
    x0, x0_hat, x0_low, x0_low_hat = (x.requires_grad_() for x in branches)
    w = low_noise_weight(SIGMA, 0.3)
    c = control_variate(x0, x0_hat, x0_low, x0_low_hat)
    target = corrected_target(x0, x0_low, x0_low_hat, c, w)
    loss = flow_loss(x0_hat, target, SIGMA, weight=10, sigma_clamp=0.05)

    assert not c.requires_grad
    assert not target.requires_grad
    (gradient,) = torch.autograd.grad(loss.sum(), x0_hat)
    scale = 10 / SIGMA.clamp(min=0.05).square().view(B, 1, 1) / (N * D)
    assert_close(gradient, scale * (x0_hat - target).detach())


def test_the_perceptual_gradient_is_that_of_the_gated_map():
    distance = torch.rand(B, 1, 4, 6, requires_grad=True)
    gate, w = torch.rand(B, N), torch.tensor(slow_w(0.3))
    loss = perceptual_loss(distance, gate, w, SIGMA, GRID, PATCH, weight=1.0, sigma_clamp=0.05)

    (gradient,) = torch.autograd.grad(loss.sum(), distance)

    spread = gate.repeat_interleave(PATCH**2, dim=1).view(B, N, PATCH**2)
    scale = (w / SIGMA.clamp(min=0.05).square()).view(B, 1, 1, 1) / 24
    assert_close(gradient, scale * tokens_to_image(spread, PATCH, GRID))


def test_a_student_equal_to_the_reference_has_nothing_to_learn_at_high_noise():
    """The point of it all: the error both branches make is not chased where w is 0."""
    x0, eps_like = torch.randn(2, B, N, D)
    x0_hat = x0 - eps_like
    c = control_variate(x0, x0_hat, x0, x0_hat)
    target = corrected_target(x0, x0, x0_hat, c, torch.zeros(B))
    assert_close(flow_loss(x0_hat, target, SIGMA, weight=10, sigma_clamp=0.05), torch.zeros(B))
