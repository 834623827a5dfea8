"""Noise levels follow from seed and slot; stratified, a global batch covers them evenly."""

import math

import pytest
import torch
from torch.testing import assert_close

from asymlift.maths.schedule import draw_sigma, draw_sigma_mode, draw_sigma_uniform
from asymlift.model.batch import Place
from asymlift.model.noise_levels import NoiseLevels
from asymlift.recipe import TimeSection

SIZE = (1024, 1024)
BATCH = 32
STEPS = 400
KINDS = ("logit_normal", "uniform", "mode")


def levels(slots, *, seed: int = 0, size=SIZE, **values) -> torch.Tensor:
    return NoiseLevels(TimeSection(**values), BATCH)(Place(seed, 0, slots), size)


def by_step(**values) -> torch.Tensor:
    return levels(range(STEPS * BATCH), **values).double().view(STEPS, BATCH)


@pytest.mark.parametrize("stratified", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_any_split_over_ranks_and_micro_batches_draws_the_same(kind, stratified):
    slots = list(range(3 * BATCH, 4 * BATCH))
    whole = levels(slots, kind=kind, stratified=stratified)
    parts = [levels([slot], kind=kind, stratified=stratified) for slot in reversed(slots)]
    assert torch.equal(whole, torch.cat(parts).flip(0))
    assert whole.dtype == torch.float32 and whole.device.type == "cpu"
    assert not torch.equal(whole, levels(slots, kind=kind, stratified=stratified, seed=1))


@pytest.mark.parametrize("stratified", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_the_levels_have_the_distribution_of_their_kind(kind, stratified):
    """Their quantiles over many steps, and those of one slot alone."""
    use = TimeSection(kind=kind, shift=4.0, mean=0.3, std=0.8)
    u = torch.linspace(0.05, 0.95, 19, dtype=torch.float64)
    expected = {
        "logit_normal": draw_sigma(torch.special.ndtri(u), shift=4.0, mean=0.3, std=0.8),
        "uniform": draw_sigma_uniform(u, shift=4.0),
        "mode": draw_sigma_mode(1 - u, shift=4.0, scale=use.mode_scale),
    }[kind]
    drawn = by_step(kind=kind, shift=4.0, mean=0.3, std=0.8, stratified=stratified)
    assert_close(drawn.flatten().quantile(u), expected, atol=0.02, rtol=0)
    assert_close(drawn[:, 5].quantile(u), expected, atol=0.1, rtol=0)


@pytest.mark.parametrize("kind", KINDS)
def test_stratified_every_share_of_a_batch_is_drawn_once(kind):
    """So the mean over a batch varies less, by far."""
    even, free = by_step(kind=kind, stratified=True), by_step(kind=kind)
    assert float(even.mean(1).var()) < 0.05 * float(free.mean(1).var())
    assert float(even.mean()) == pytest.approx(float(free.mean()), abs=0.01)
    shares = by_step(kind="uniform", shift=1.0, stratified=True) * BATCH
    assert torch.equal(shares.long().sort(1).values, torch.arange(BATCH).expand(STEPS, -1))


def test_the_shift_of_each_resolution_grows_with_its_side():
    slots, plain = range(8), {"kind": "uniform", "shift": 17.0}
    same = levels(slots, **plain)
    assert torch.equal(levels(slots, per_resolution=True, **plain), same)
    for size, factor in (((512, 512), 0.5), ((2048, 512), 1.0), ((1024, 512), math.sqrt(0.5))):
        assert torch.equal(levels(slots, size=size, **plain), same)
        found = levels(slots, size=size, per_resolution=True, **plain)
        assert_close(found, levels(slots, kind="uniform", shift=17.0 * factor))
