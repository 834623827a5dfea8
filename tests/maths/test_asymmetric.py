import pytest
import torch
from torch import Tensor
from torch.testing import assert_close

from asymlift.maths.asymmetric import (
    asymmetric_target,
    calibrate,
    clean_input,
    project,
    recover_velocity,
)
from asymlift.maths.basis import random_basis

D = 12


def basis(rank: int) -> Tensor:
    return random_basis(D, rank, torch.Generator().manual_seed(rank))


def level(sigma: float) -> Tensor:
    return torch.full((3, 1, 1), sigma)


def test_projecting_keeps_the_subspace_and_drops_the_rest():
    A, x = basis(5), torch.randn(3, 5, D)
    assert_close(project(x, A), x @ (A @ A.T))
    assert_close(project(project(x, A), A), project(x, A))
    assert_close((x - project(x, A)) @ A, torch.zeros(3, 5, 5))


@pytest.mark.parametrize("rank", [0, 1, 7, D])
@pytest.mark.parametrize("s", [0.4, 1.0, 2.5])
@pytest.mark.parametrize("sigma", [1.0, 0.5, 1e-3])
def test_the_pixel_velocity_comes_back_exactly(rank, s, sigma):
    """Nothing is lost by restricting the noise: u = eps - x0 for any data, s and sigma."""
    A, sigma = basis(rank), level(sigma)
    x0, eps = torch.randn(2, 3, 5, D)
    x_t = (1 - sigma) * x0 + sigma * eps
    u_a = asymmetric_target(x0, eps, A, s)

    u = recover_velocity(u_a, x_t, A, s, sigma, floor=1e-6)

    assert_close(u, eps - x0, rtol=0, atol=1e-11)


@pytest.mark.parametrize("s", [0.4, 1.0, 2.5])
def test_the_target_is_the_projected_noise_less_the_scaled_image(s):
    A = basis(4)
    x0, eps = torch.randn(2, 3, 5, D)
    assert_close(asymmetric_target(x0, eps, A, s), eps @ (A @ A.T) - x0 / s)


def test_rank_zero_predicts_the_image_and_full_rank_the_velocity():
    x0, eps = torch.randn(2, 3, 5, D)
    assert_close(asymmetric_target(x0, eps, basis(0), 1.0), -x0)
    assert_close(asymmetric_target(x0, eps, basis(D), 1.0), eps - x0)


@pytest.mark.parametrize("s", [0.4, 1.0, 2.5])
@pytest.mark.parametrize("sigma", [1.0, 0.5, 1e-3, 0.0])
def test_the_network_sees_a_latent_at_the_noise_level_it_is_told(s, sigma):
    """Inside the subspace k x_t = (1 - tau) z0 + tau eps', whatever lies outside it."""
    A, sigma = basis(4), level(sigma)
    z0, eps = torch.randn(3, 5, 4), torch.randn(3, 5, D)
    outside = torch.randn(3, 5, D)
    x0 = s * z0 @ A.T + outside - project(outside, A)
    x_t = (1 - sigma) * x0 + sigma * eps

    k, tau = calibrate(sigma, s)

    assert_close(k * x_t @ A, (1 - tau) * z0 + tau * eps @ A)


@pytest.mark.parametrize("s", [0.1, 1.004, 3.107])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_pure_noise_and_clean_images_keep_their_noise_level_to_the_last_bit(s, dtype):
    k, tau = calibrate(torch.tensor([1.0, 0.0], dtype=dtype), s)
    assert tau.tolist() == [1.0, 0.0]
    assert k[0] == 1
    assert float(k[1]) == pytest.approx(1 / s)


@pytest.mark.parametrize("s", [0.4, 1.0, 2.5])
def test_a_clean_picture_is_read_as_the_clean_latent_at_any_noise_level(s):
    """x_ref / s, which is k x_ref at sigma = 0; the k of the noisy picture beside it is wrong."""
    A, z0, outside = basis(4), torch.randn(3, 5, 4), torch.randn(3, 5, D)
    x_ref = s * z0 @ A.T + outside - project(outside, A)

    assert_close(clean_input(x_ref, s) @ A, z0)
    assert_close(clean_input(x_ref, s), calibrate(level(0.0), s)[0] * x_ref)
    if s != 1:
        assert not torch.allclose(calibrate(level(0.5), s)[0] * x_ref @ A, z0, rtol=0.1)


@pytest.mark.parametrize("s", [0.4, 2.5])
@pytest.mark.parametrize("sigma", [0.5, 1e-3])
def test_only_the_complement_is_divided_by_the_floor(s, sigma):
    """The published formula, with P as a matrix, for any network output."""
    A, sigma, floor = basis(4), level(sigma), 0.1
    u_a, x_t = torch.randn(2, 3, 5, D)
    P, k = A @ A.T, 1 / (s + (1 - s) * sigma)
    inside = k * (s * u_a @ P + (1 - s) * x_t @ P)
    outside = ((x_t - x_t @ P) + s * (u_a - u_a @ P)) / sigma.clamp(min=floor)

    u = recover_velocity(u_a, x_t, A, s, sigma, floor=floor)

    assert_close(u, inside + outside)


@pytest.mark.parametrize("s", [0.4, 2.5])
def test_a_freshly_lifted_model_predicts_only_low_rank_images(s):
    """Whatever the state, x_t - sigma u is s A z0_hat of the latent model."""
    A, sigma = basis(4), level(0.3)
    x_t, v = torch.randn(3, 5, D), torch.randn(3, 5, 4)
    k, tau = calibrate(sigma, s)

    u = recover_velocity(v @ A.T, x_t, A, s, sigma, floor=1e-6)

    z0_hat = k * x_t @ A - tau * v
    assert_close(x_t - sigma * u, s * z0_hat @ A.T)


def test_float32_keeps_five_digits_at_a_thousandth_of_noise():
    """The division magnifies rounding; with two separate projections the error was 1.6 times."""
    A = random_basis(768, 128, torch.Generator().manual_seed(0))
    sigma = level(1e-3)
    x0, eps = torch.randn(2, 3, 16, 768)
    x_t, u_a = (1 - sigma) * x0 + sigma * eps, asymmetric_target(x0, eps, A, 1.3)

    u = recover_velocity(u_a.float(), x_t.float(), A.float(), 1.3, sigma.float(), floor=1e-6)

    assert u.dtype == torch.float32
    assert (u - (eps - x0)).square().mean().sqrt() < 2e-4
