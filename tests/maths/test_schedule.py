import math

import pytest
import torch
from torch.testing import assert_close

from asymlift.maths.schedule import (
    draw_sigma,
    draw_sigma_mode,
    draw_sigma_uniform,
    middles,
    pixel_shift,
    shift_for_pixels,
    shift_time,
    sigma_from_tau,
    sigma_grid,
    stratified_draws,
    tau_from_sigma,
)

T = torch.linspace(0, 1, 11, dtype=torch.float64)


@pytest.mark.parametrize("shift", [0.3, 1.0, 17.0])
def test_shifting_follows_the_published_formula_and_keeps_both_ends(shift):
    assert_close(shift_time(T, shift), shift * T / (1 + (shift - 1) * T))
    assert shift_time(T, shift)[[0, -1]].tolist() == [0.0, 1.0]


def test_shifting_moves_the_middle_towards_noise():
    assert shift_time(torch.tensor(0.5), 17.0) == 17 / 18


@pytest.mark.parametrize("steps", [1, 7, 50])
@pytest.mark.parametrize("shift", [0.1, 1.0, 3.107, 17.0])
def test_a_grid_falls_from_exactly_one_to_exactly_zero(steps, shift):
    grid = sigma_grid(steps, shift)
    assert grid.dtype == torch.float64
    assert grid.shape == (steps + 1,)
    assert grid[0] == 1
    assert grid[-1] == 0
    assert (grid.diff() < 0).all()


def test_a_grid_is_evenly_spaced_before_its_shift():
    expected = [17 * t / (1 + 16 * t) for t in (1, 0.75, 0.5, 0.25, 0)]
    assert_close(sigma_grid(4, 17.0), torch.tensor(expected))


@pytest.mark.parametrize("s", [0.3, 1.0, 3.107])
def test_pixel_and_latent_noise_levels_invert_each_other(s):
    assert_close(sigma_from_tau(T, s), s * T / (1 - (1 - s) * T))
    assert_close(tau_from_sigma(T, s), T / (s + (1 - s) * T))
    assert_close(sigma_from_tau(tau_from_sigma(T, s), s), T)
    assert_close(tau_from_sigma(sigma_from_tau(T, s), s), T)


@pytest.mark.parametrize("s", [0.3, 3.107])
@pytest.mark.parametrize("latent_shift", [1.0, 3.0])
def test_the_shift_of_the_base_times_s_gives_the_grid_of_the_base(s, latent_shift):
    pixel_grid = sigma_grid(24, pixel_shift(latent_shift, s))
    assert_close(tau_from_sigma(pixel_grid, s), sigma_grid(24, latent_shift))


def test_the_published_shift_grows_with_the_side_of_the_image():
    shifts = [
        shift_for_pixels(512, 512),
        shift_for_pixels(1024, 1024),
        shift_for_pixels(4096, 1024),
    ]
    assert shifts == [8.5, 17.0, 34.0]


def test_normal_draws_become_shifted_logit_normal_levels():
    normal = torch.tensor([-2.0, 0.0, 1.5])
    t = [1 / (1 + math.exp(-(0.8 + 0.7 * n))) for n in normal.tolist()]
    expected = [3 * x / (1 + 2 * x) for x in t]
    assert_close(draw_sigma(normal, shift=3.0, mean=0.8, std=0.7), torch.tensor(expected))


def test_uniform_draws_become_shifted_levels():
    assert_close(draw_sigma_uniform(T, shift=3.0), 3 * T / (1 + 2 * T))


def test_stratified_draws_fall_into_every_share_once():
    drawn = [stratified_draws(7, torch.Generator().manual_seed(n)) for n in range(300)]
    for u in drawn:
        assert u.dtype == torch.float64
        assert sorted((7 * u).long().tolist()) == list(range(7))
    first = torch.stack(drawn)[:, 0]
    assert abs(float(first.mean()) - 0.5) < 0.05 and abs(float(first.var()) - 1 / 12) < 0.01


def test_mode_draws_follow_the_published_formula():
    u = torch.tensor([0.0, 0.25, 0.5, 1.0])
    expected = [1 - x - 1.29 * (math.cos(math.pi / 2 * x) ** 2 - 1 + x) for x in u.tolist()]

    t = draw_sigma_mode(u, shift=1.0, scale=1.29)

    assert_close(t, torch.tensor(expected))
    assert_close(t[[0, 2, 3]], torch.tensor([1.0, 0.5, 0.0]))
    assert_close(draw_sigma_mode(u, shift=3.0, scale=1.29), 3 * t / (1 + 2 * t))


def test_mode_draws_are_uniform_at_scale_zero_and_crowd_the_middle_above():
    u = torch.linspace(0, 1, 1001)
    assert_close(draw_sigma_mode(u, shift=1.0, scale=0.0), 1 - u)
    near_middle = (draw_sigma_mode(u, shift=1.0, scale=1.29) - 0.5).abs() < 0.1
    assert near_middle.double().mean() > 0.3  # 0.2 if uniform


@pytest.mark.parametrize("count", [1, 5, 8])
def test_middles_stand_for_equal_shares(count):
    found = middles(count)
    assert_close(found.diff(), torch.full((count - 1,), 1 / count, dtype=torch.float64))
    assert_close(found.mean(), torch.tensor(0.5, dtype=torch.float64))
    assert found[0] > 0 and found[-1] < 1
