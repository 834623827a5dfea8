"""Noise levels: those drawn in training, the grid of a sampler, and pixel against latent levels.

1 is pure noise and 0 the image. sigma is the pixel level, tau the one a lifted network is told.
"""

import math

import torch
from torch import Tensor

from asymlift.maths.asymmetric import calibrate


def shift_time(t: Tensor, shift: float | Tensor) -> Tensor:
    """shift t / (1 + (shift - 1) t): more time at high noise when shift > 1."""
    return shift * t / (shift * t + (1 - t))  # in this order 1 stays 1 to the last bit


def draw_sigma(normal: Tensor, *, shift: float, mean: float, std: float) -> Tensor:
    """Shifted logit-normal noise levels from unit normal draws."""
    return shift_time(torch.sigmoid(mean + std * normal), shift)


def draw_sigma_uniform(uniform: Tensor, *, shift: float) -> Tensor:
    """Shifted uniform noise levels from uniform draws in [0, 1]."""
    return shift_time(uniform, shift)


def draw_sigma_mode(uniform: Tensor, *, shift: float, scale: float) -> Tensor:
    """Noise levels with a mode in the middle (Esser et al. 2024, section 3.1), from uniform draws.

    scale in [-1, 1.75] keeps it monotonic; 0 is uniform, 1.29 is the paper's own choice.
    """
    u = uniform
    t = 1 - u - scale * (torch.cos(math.pi / 2 * u) ** 2 - 1 + u)
    return shift_time(t, shift)


def stratified_draws(count: int, generator: torch.Generator) -> Tensor:
    """(count,) uniform draws in [0, 1), one in each of `count` equal shares, in random order.

    Each of them alone is uniform; together they cover the interval evenly.
    """
    place = torch.randperm(count, generator=generator)
    within = torch.rand(count, generator=generator, dtype=torch.float64)
    return (place + within) / count


def middles(count: int) -> Tensor:
    """(count,) the middles of so many equal shares of [0, 1], in float64."""
    return (torch.arange(count, dtype=torch.float64) + 0.5) / count


def sigma_grid(steps: int, shift: float, *, device: torch.device | None = None) -> Tensor:
    """The (steps + 1,) noise levels of a sampler, from exactly 1 to exactly 0, in float64."""
    return shift_time(torch.linspace(1, 0, steps + 1, dtype=torch.float64, device=device), shift)


def tau_from_sigma(sigma: Tensor, s: float | Tensor) -> Tensor:
    """The latent noise level that a lifted network is told at pixel noise level sigma."""
    return calibrate(sigma, s)[1]


def sigma_from_tau(tau: Tensor, s: float | Tensor) -> Tensor:
    """s tau / (1 - (1 - s) tau), the inverse: a shift of the latent grid by s."""
    return shift_time(tau, s)


def pixel_shift(latent_shift: float, s: float) -> float:
    """The shift that gives a pixel sampler the same steps as the latent one."""
    return s * latent_shift


def shift_for_pixels(height: int, width: int, *, at_1024: float = 17.0) -> float:
    """Published: 17 at 1024 x 1024, growing with the image's side as its signal does."""
    return at_1024 * math.sqrt(height * width) / 1024
