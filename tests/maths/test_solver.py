import pytest
import torch
from torch import Tensor
from torch.testing import assert_close

from asymlift.maths.asymmetric import calibrate, recover_velocity
from asymlift.maths.basis import random_basis
from asymlift.maths.lift import lift_first, lift_last
from asymlift.maths.schedule import sigma_grid, tau_from_sigma
from asymlift.maths.solver import Velocity, euler, heun

D, RANK, INNER = 48, 8, 16


def lifted_pair(s: float) -> tuple[Velocity, Velocity, Tensor]:
    """A random two-layer latent flow, and the pixel flow it becomes when its maps are lifted."""
    A = random_basis(D, RANK, torch.Generator().manual_seed(0))
    W_in, W_out = torch.randn(INNER, RANK) / 2, torch.randn(RANK, INNER) / 2
    W_in_lifted = lift_first(W_in, A, patch=2, order="c p q")
    W_out_lifted = lift_last(W_out, A, patch=2, order="c p q")

    def latent(z: Tensor, tau: Tensor) -> Tensor:
        return torch.tanh(z @ W_in.T + 2 * tau) @ W_out.T

    def pixel(x: Tensor, sigma: Tensor) -> Tensor:
        k, tau = calibrate(sigma, s)
        u_a = torch.tanh(k * x @ W_in_lifted.T + 2 * tau) @ W_out_lifted.T
        return recover_velocity(u_a, x, A, s, sigma, floor=1e-6)

    return pixel, latent, A


@pytest.mark.parametrize("s", [0.3, 1.0, 3.107])
@pytest.mark.parametrize("steps", [1, 2, 7, 40])
@pytest.mark.parametrize("shift", [1.0, 17.0])
def test_euler_in_pixels_is_euler_in_latents(s, steps, shift):
    """The acceptance test of every conversion: the final image is s A z, for any step count."""
    pixel, latent, A = lifted_pair(s)
    eps = torch.randn(2, 6, D)
    sigmas = sigma_grid(steps, shift)

    x = euler(pixel, eps, sigmas)
    z = euler(latent, eps @ A, tau_from_sigma(sigmas, s))

    assert_close(x, s * z @ A.T, rtol=0, atol=1e-12)


def test_heun_in_pixels_is_not_heun_in_latents():
    """It averages two velocities, whose levels map unevenly: gate conversions on Euler."""
    pixel, latent, A = lifted_pair(3.107)
    eps, sigmas = torch.randn(2, 6, D), sigma_grid(8, 1.0)

    x = heun(pixel, eps, sigmas)
    z = heun(latent, eps @ A, tau_from_sigma(sigmas, 3.107))

    assert (x - 3.107 * z @ A.T).abs().max() > 1e-3


def test_euler_takes_one_step_per_pair_of_levels():
    seen: list[tuple[int, float]] = []
    levels: list[float] = []

    def velocity(x: Tensor, sigma: Tensor) -> Tensor:
        levels.append(float(sigma))
        return 10 * sigma + x

    def on_step(step: int, x: Tensor) -> None:
        seen.append((step, float(x)))

    x = euler(velocity, torch.tensor(1.0), torch.tensor([1.0, 0.5, 0.25, 0.0]), on_step)

    # 1 - 0.5 (10 + 1) = -4.5;  -4.5 - 0.25 (5 - 4.5) = -4.625;  -4.625 - 0.25 (2.5 - 4.625)
    assert seen == [(1, -4.5), (2, -4.625), (3, -4.09375)]
    assert levels == [1.0, 0.5, 0.25]
    assert float(x) == -4.09375


def test_heun_is_exact_when_the_velocity_is_linear_in_time():
    sigmas = torch.tensor([1.0, 0.6, 0.5, 0.1])
    assert_close(heun(lambda x, sigma: 2 * sigma, sigmas[0] ** 2, sigmas), sigmas[-1] ** 2)


def test_heun_averages_the_slopes_at_both_ends():
    seen: list[tuple[int, float]] = []
    x = heun(
        lambda x, sigma: x * sigma,
        torch.tensor(1.0),
        torch.tensor([1.0, 0.5, 0.0]),
        on_step=lambda step, x: seen.append((step, float(x))),
    )
    # slopes 1 and (1 - 0.5) 0.5 average 0.625: x = 0.6875; then Euler with slope 0.34375.
    assert seen == [(1, 0.6875), (2, 0.515625)]
    assert float(x) == 0.515625


def test_heun_never_asks_for_the_velocity_at_zero_noise():
    levels: list[float] = []

    def velocity(x: Tensor, sigma: Tensor) -> Tensor:
        levels.append(float(sigma))
        return x

    heun(velocity, torch.ones(2), torch.tensor([1.0, 0.5, 0.0]))
    assert levels == [1.0, 0.5, 0.5]


@pytest.mark.parametrize("solver", [euler, heun])
def test_a_float64_grid_leaves_a_float32_image_float32(solver):
    x = solver(lambda x, sigma: x, torch.ones(2, 3, dtype=torch.float32), sigma_grid(3, 17.0))
    assert x.dtype == torch.float32
