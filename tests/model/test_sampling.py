"""Samplers: they follow the latent sampler through the lift, converge, and depend on no batch."""

from dataclasses import replace

import pytest
import torch
from torch.testing import assert_close

from asymlift.errors import BadRecipe
from asymlift.families import FAMILIES
from asymlift.families.base import Geometry
from asymlift.maths.asymmetric import calibrate, recover_velocity
from asymlift.maths.basis import random_basis
from asymlift.maths.color import ColorCode
from asymlift.maths.schedule import sigma_grid, tau_from_sigma
from asymlift.maths.solver import euler, heun
from asymlift.model.sampling import (
    SampleSettings,
    latent_noise,
    noise_for,
    noise_levels,
    pixel_noise,
    sample_latents,
    sample_pixels,
    solve_pixels,
    unipc,
)
from tests import tiny
from tests.families.case import case_of

GEOMETRY = Geometry(vae_factor=2, channels=3, patch=2)  # p = 4, D = 48, d = 12
GRID = (2, 3)
N = 6
COLOR = ColorCode("rgb", mean=(0.4, 0.5, 0.6), std=0.25)
EULER = SampleSettings(solver="euler", steps=7, guidance=1.0, orthogonal=0.0, clamp=False)


class Latent:
    """A velocity of latents that is neither linear nor local, and counts its calls."""

    geometry = GEOMETRY

    def __init__(self, dtype=torch.float64, family="qwenimage"):
        self.family = FAMILIES[family]
        draw = torch.Generator().manual_seed(1)
        self.inside = torch.randn(GEOMETRY.d, 16, generator=draw, dtype=torch.float64).to(dtype)
        self.out = torch.randn(16, GEOMETRY.d, generator=draw, dtype=torch.float64).to(dtype)
        self.calls = 0

    def __call__(self, z_t, tau, text, grid):
        self.calls += 1
        assert grid == GRID
        hidden = torch.tanh(z_t @ self.inside / 3 + tau[:, None, None] + text["words"][:, None])
        return (hidden + hidden.mean(1, keepdim=True)) @ self.out / 3 + z_t / 2


class Lifted:
    """The same velocity, seen through a basis: what a network does right after convert."""

    geometry = GEOMETRY

    def __init__(self, latent, A, s):
        self.latent, self.A, self.s = latent, A, s
        self.family = latent.family

    def __call__(self, x_t, sigma, text, grid, *, floor):
        return self.recover(self.predict(x_t, sigma, text, grid), x_t, sigma, floor=floor)

    def predict(self, x_t, sigma, text, grid):
        k, _ = calibrate(sigma[:, None, None], self.s)
        return self.latent(k * x_t @ self.A, tau_from_sigma(sigma, self.s), text, grid) @ self.A.T

    def recover(self, u_a, x_t, sigma, *, floor):
        return recover_velocity(u_a, x_t, self.A, self.s, sigma[:, None, None], floor=floor)


def words(value, batch=2):
    return {"words": torch.full((batch, 16), value, dtype=torch.float64)}


def both(settings, s, base_shift=1.5, latent_settings=None, family="qwenimage"):
    """Pixel tokens and s A z, from matched noise on matched grids."""
    A = random_basis(GEOMETRY.D, GEOMETRY.d, torch.Generator().manual_seed(2))
    latent = Latent(family=family)
    sigmas = noise_levels(settings, height=8, width=12, s=s, base_shift=base_shift)
    eps = pixel_noise(5, [0, 1], 8, 12, 4).double()
    x = solve_pixels(
        Lifted(latent, A, s), eps, words(0.3), words(-1.0), sigmas, settings, COLOR, GRID
    )
    z = sample_latents(
        latent,
        latent_noise(eps, A),
        words(0.3),
        words(-1.0),
        tau_from_sigma(sigmas, s),
        latent_settings or settings,
        GRID,
    )
    return x, s * z @ A.T


def difference(settings, s, **options):
    x, low = both(settings, s, **options)
    return ((x - low).norm() / low.norm()).item()


@pytest.mark.parametrize("s", [0.4, 1.0, 2.5])
@pytest.mark.parametrize("steps", [1, 7])
@pytest.mark.parametrize("guidance", [1.0, 4.0])
def test_euler_in_pixels_is_euler_in_latents(s, steps, guidance):
    assert difference(replace(EULER, steps=steps, guidance=guidance, shift="base"), s) < 1e-12


@pytest.mark.parametrize("name", FAMILIES)
def test_a_lifted_network_draws_what_its_base_draws(name):
    """The real classes, with guidance: x = s A z to float error, after any number of steps."""
    pair = tiny.lifted_pair(name, s=1.7)
    null = tiny.tiny_text(name, 2, seed=9, dtype=torch.float64)
    settings = replace(EULER, guidance=3.0, orthogonal=1.0, steps=4, shift="base")
    case, patch = case_of(name), pair.geometry.pixel_patch
    sigmas = noise_levels(settings, height=case.height, width=case.width, s=1.7, base_shift=3.0)
    eps = pixel_noise(0, [0, 1], case.height, case.width, patch).double()

    x = solve_pixels(pair.pixel, eps, pair.text, null, sigmas, settings, COLOR, pair.grid)
    z = sample_latents(
        pair.latent,
        latent_noise(eps, pair.A),
        pair.text,
        null,
        tau_from_sigma(sigmas, 1.7),
        settings,
        pair.grid,
    )

    low = 1.7 * z @ pair.A.T
    assert (x - low).norm() / low.norm() < 1e-12


@pytest.mark.parametrize("s", [0.4, 2.5])
@pytest.mark.parametrize("shift", ["base", "sqrt_pixels", 3.0])
def test_unipc_in_pixels_is_unipc_in_latents(s, shift):
    settings = replace(EULER, solver="unipc", guidance=4.0, shift=shift, steps=9)
    assert difference(settings, s) < 3e-6  # both start 1e-6 below 1, from noise for 1


def test_heun_in_pixels_is_not_heun_in_latents():
    assert difference(replace(EULER, solver="heun", shift="base"), 2.5) > 1e-3


def test_orthogonal_guidance_commutes_with_the_lift_only_where_the_latents_use_it_too():
    """A is orthonormal and the predicted image is s A z0: the same component goes on both sides."""
    orthogonal = replace(EULER, guidance=4.0, orthogonal=1.0, shift="base")

    assert difference(orthogonal, 2.5) < 1e-12
    assert difference(orthogonal, 2.5, latent_settings=replace(orthogonal, orthogonal=0.0)) > 1e-3


@pytest.mark.parametrize("family", ["qwenimage", "longcat", "zimage", "lumina2"])
def test_renormalised_guidance_commutes_with_the_lift(family):
    """In u_a. Of the velocities themselves, whose complement counts too, it would not."""
    renorm, plain = (replace(EULER, guidance=4.0, renorm=on, shift="base") for on in (True, False))

    assert difference(renorm, 2.5, family=family) < 1e-12
    assert difference(renorm, 2.5, latent_settings=plain, family=family) > 1e-3


def test_clamped_denoising_has_no_counterpart_in_latents():
    assert difference(replace(EULER, clamp=True, shift="base"), 2.5) > 1e-3


def test_base_shift_is_the_grid_on_which_the_base_samples():
    sigmas = noise_levels(replace(EULER, shift="base"), height=8, width=8, s=2.5, base_shift=3.0)
    assert_close(tau_from_sigma(sigmas, 2.5), sigma_grid(7, 3.0))


def test_the_published_shift_is_17_at_one_megapixel():
    for side, shift in ((1024, 17.0), (512, 8.5), (2048, 34.0)):
        sigmas = noise_levels(EULER, height=side, width=side, s=9.0, base_shift=5.0)
        assert_close(sigmas, sigma_grid(7, shift))


def test_a_grid_that_ends_below_the_floor_is_refused_with_the_largest_number_of_steps():
    settings = replace(EULER, shift=0.5, floor=0.05)
    with pytest.raises(BadRecipe) as refused:
        noise_levels(replace(settings, steps=30), height=8, width=8, s=1.0, base_shift=1.0)
    assert "30 steps at shift 0.5 end on noise level 1.7e-02" in str(refused.value)
    assert "at most 10 steps" in str(refused.value)

    noise_levels(replace(settings, steps=10), height=8, width=8, s=1.0, base_shift=1.0)
    with pytest.raises(BadRecipe):
        noise_levels(replace(settings, steps=11), height=8, width=8, s=1.0, base_shift=1.0)


def test_unipc_is_called_on_exactly_our_grid():
    """Neither its own shift, nor its rounded timesteps, which repeat when the steps are fine."""
    seen = []

    def velocity(x, sigma):
        seen.append(sigma)
        return torch.zeros_like(x)

    sigmas = sigma_grid(3000, 17.0)
    done = []
    unipc(velocity, torch.zeros(1, 2, 3), sigmas, lambda step, x: done.append(step))

    assert seen[0] == 1 - 1e-6
    assert_close(torch.stack(seen[1:]), sigmas[1:-1], rtol=0, atol=0)
    assert done == list(range(1, 3001))


@pytest.mark.parametrize("solver", [euler, heun, unipc])
def test_one_picture_only_is_reached_in_any_number_of_steps(solver):
    """Where the predicted image never changes, every step is exact."""
    picture = torch.randn(1, 4, 5, dtype=torch.float64)
    x = torch.randn(1, 4, 5, dtype=torch.float64)
    for steps in (1, 2, 17):
        result = solver(lambda x, sigma: (x - picture) / sigma, x, sigma_grid(steps, 3.0))
        assert_close(result, picture)


def gaussian_velocity(x, sigma):
    """The exact velocity of data from N(0.7, 0.3^2): noise eps ends at 0.7 + 0.3 eps."""
    variance = (0.3 * (1 - sigma)) ** 2 + sigma**2
    x0_hat = 0.7 + (1 - sigma) * 0.09 / variance * (x - (1 - sigma) * 0.7)
    return (x - x0_hat) / sigma


def test_unipc_converges_with_second_order_to_where_euler_goes():
    eps = torch.randn(1, 2, 50, dtype=torch.float64)

    def error(solver, steps):
        got = solver(gaussian_velocity, eps, sigma_grid(steps, 1.0))
        return (got - (0.7 + 0.3 * eps)).abs().max().item()

    assert 3.3 < error(unipc, 80) / error(unipc, 160) < 4.7
    assert 1.8 < error(euler, 80) / error(euler, 160) < 2.2
    assert error(unipc, 160) < error(euler, 160) / 20


def test_unipc_in_float32_loses_only_float32():
    eps = torch.randn(2, 2, 50, dtype=torch.float64)
    sigmas = sigma_grid(38, 17.0)
    exact = unipc(gaussian_velocity, eps, sigmas)
    single = unipc(gaussian_velocity, eps.float(), sigmas)
    assert single.dtype == torch.float32
    assert_close(single.double(), exact, rtol=0, atol=2e-6)


def test_noise_depends_on_seed_and_index_only():
    assert_close(noise_for(3, 1, (3, 8, 8)), noise_for(3, 1, (3, 8, 8)), rtol=0, atol=0)
    several = torch.stack([noise_for(s, i, (3, 32, 32)) for s in (0, 1) for i in (0, 1, 2)])
    correlation = torch.corrcoef(several.flatten(1))
    assert_close(correlation, torch.eye(6), rtol=0, atol=0.08)  # 4 standard deviations
    assert abs(several.mean()) < 0.03
    assert abs(several.std() - 1) < 0.03


def test_latent_noise_is_unit_noise():
    A = random_basis(48, 12, torch.Generator().manual_seed(2))
    z = latent_noise(pixel_noise(0, range(8), 64, 64, 4), A)
    assert_close(torch.cov(z.flatten(0, 1).T), torch.eye(12), rtol=0, atol=0.1)


@pytest.mark.parametrize("solver", ["euler", "heun", "unipc"])
def test_a_picture_does_not_depend_on_the_others_in_its_batch(solver):
    A = random_basis(48, 12, torch.Generator().manual_seed(2))
    flow = Lifted(Latent(), A, 2.5)
    settings = replace(SampleSettings(), solver=solver, steps=6)
    sigmas = noise_levels(settings, height=8, width=12, s=2.5, base_shift=1.0)

    def pictures(indices):
        batch = len(indices)
        eps = pixel_noise(0, indices, 8, 12, 4).double()
        return sample_pixels(
            flow, eps, words(0.3, batch), words(-1.0, batch), sigmas, settings, COLOR, GRID
        )

    together = pictures([0, 1, 2])
    for index in range(3):
        assert_close(pictures([index])[0], together[index], rtol=0, atol=1e-12)


@pytest.mark.parametrize(("guidance", "calls"), [(1.0, 5), (4.0, 10)])
def test_without_guidance_the_network_runs_once_a_step(guidance, calls):
    latent = Latent()
    settings = replace(EULER, steps=5, guidance=guidance)
    steps = []
    sample_latents(
        latent,
        torch.randn(2, N, 12, dtype=torch.float64),
        words(0.3),
        words(-1.0) if guidance != 1 else None,
        sigma_grid(5, 1.0),
        settings,
        GRID,
        lambda step, z: steps.append(step),
    )
    assert latent.calls == calls
    assert steps == [1, 2, 3, 4, 5]


@pytest.mark.parametrize("space", ["rgb", "oklab"])
def test_pictures_stay_in_range_and_clamping_leaves_a_picture_in_range_alone(space):
    color = ColorCode(space, mean=(0.5, 0.5, 0.5) if space == "rgb" else (0.56, 0, 0.01), std=0.2)
    A = random_basis(48, 12, torch.Generator().manual_seed(2))
    eps = pixel_noise(0, [0, 1], 8, 12, 4).double()
    for clamp in (False, True):
        settings = replace(EULER, guidance=7.0, clamp=clamp)
        sigmas = noise_levels(settings, height=8, width=12, s=2.5, base_shift=1.0)
        image = sample_pixels(
            Lifted(Latent(), A, 2.5),
            eps,
            words(0.3),
            words(-1.0),
            sigmas,
            settings,
            color,
            GRID,
        )
        assert image.shape == (2, 3, 8, 12)
        assert image.abs().max() <= 1
        assert image.isfinite().all()
