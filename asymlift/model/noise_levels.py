"""The noise level of every slot of a run: a function of (seed, slot), drawn on the host.

Apart from the noise, and in float64, so that they decide what is computed without asking a GPU.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from asymlift.data.order import generator
from asymlift.maths.schedule import (
    draw_sigma,
    draw_sigma_mode,
    draw_sigma_uniform,
    shift_for_pixels,
    stratified_draws,
)
from asymlift.model.batch import Place
from asymlift.recipe import TimeSection


@dataclass(frozen=True)
class NoiseLevels:
    """How a run draws them."""

    use: TimeSection
    batch: int  # global

    def __call__(self, place: Place, size: tuple[int, int]) -> Tensor:
        """The levels of these slots, for pictures of this (height, width): float32, on the host."""
        draw = self.stratified if self.use.stratified else self.independent
        return self.levels(draw(place), self.shift(size)).float()

    def independent(self, place: Place) -> Tensor:
        generators = (generator(place.seed, "level", slot) for slot in place.slots)
        return torch.stack([torch.rand((), generator=g, dtype=torch.float64) for g in generators])

    def stratified(self, place: Place) -> Tensor:
        """A step's levels are drawn at once, and each slot takes its own."""
        steps = {slot // self.batch for slot in place.slots}
        drawn = {
            step: stratified_draws(self.batch, generator(place.seed, "levels", step))
            for step in steps
        }
        return torch.stack([drawn[slot // self.batch][slot % self.batch] for slot in place.slots])

    def shift(self, size: tuple[int, int]) -> float:
        use = self.use
        return shift_for_pixels(*size, at_1024=use.shift) if use.per_resolution else use.shift

    def levels(self, uniform: Tensor, shift: float) -> Tensor:
        use = self.use
        if use.kind == "uniform":
            return draw_sigma_uniform(uniform, shift=shift)
        if use.kind == "mode":
            return draw_sigma_mode(uniform, shift=shift, scale=use.mode_scale)
        normal: Tensor = torch.special.ndtri(uniform)
        return draw_sigma(normal, shift=shift, mean=use.mean, std=use.std)
