"""Second moments of aligned token pairs, streamed: all that fitting a basis needs, in float64.

D pixel token width, d latent token width (0 when there are no latents). Pixel tokens come in the
raw units of the colour space; `normalised` gives, exactly, what normalised pixels would have given.
"""

from dataclasses import dataclass, fields, replace
from typing import Self

import torch
from torch import Tensor


@dataclass(eq=False)
class Moments:
    """Sums over tokens x (pixels) and z (latents of the same cells)."""

    num_images: int
    num_tokens: int
    sum_x: Tensor  # (D,)
    sum_z: Tensor  # (d,)
    gram: Tensor  # (D, D), sum of x x^T
    cross: Tensor  # (d, D), sum of z x^T
    energy_z: Tensor  # (), sum of ||z||^2

    @classmethod
    def zero(cls, D: int, d: int, *, device: torch.device | None = None) -> Self:
        def zeros(*shape: int) -> Tensor:
            return torch.zeros(shape, dtype=torch.float64, device=device)

        return cls(0, 0, zeros(D), zeros(d), zeros(D, D), zeros(d, D), zeros())

    def add(self, x: Tensor, z: Tensor, num_images: int) -> Self:
        """Add the pairs of a chunk, in place: x (..., D) and z (..., d)."""
        assert x.shape[:-1] == z.shape[:-1], f"unpaired tokens: {x.shape} and {z.shape}"
        # Products of float32 are exact in float64, so chunks of any size give the same sums.
        x, z = x.flatten(0, -2).double(), z.flatten(0, -2).double()
        self.num_images += num_images
        self.num_tokens += len(x)
        self.sum_x += x.sum(0)
        self.sum_z += z.sum(0)
        self.gram.addmm_(x.T, x)
        self.cross.addmm_(z.T, x)
        self.energy_z += z.square().sum()
        return self

    def tensors(self) -> dict[str, Tensor]:
        """Every field as a tensor, for a file; the counts are exact as int64."""
        return {field.name: torch.as_tensor(getattr(self, field.name)) for field in fields(self)}

    @classmethod
    def from_tensors(cls, tensors: dict[str, Tensor]) -> Self:
        return cls(
            int(tensors["num_images"]),
            int(tensors["num_tokens"]),
            *(tensors[name] for name in ("sum_x", "sum_z", "gram", "cross", "energy_z")),
        )


def merge(a: Moments, b: Moments) -> Moments:
    """The moments of both sets of tokens."""
    return Moments(*(getattr(a, field.name) + getattr(b, field.name) for field in fields(Moments)))


def color_statistics(moments: Moments, patch: int) -> tuple[tuple[float, float, float], float]:
    """Mean of each colour channel, and one std: the root mean square about those means."""
    num_pixels = moments.num_tokens * patch**2  # of each channel
    mean = moments.sum_x.view(3, -1).sum(1) / num_pixels
    variance = moments.gram.trace() / (3 * num_pixels) - mean.square().mean()
    red, green, blue = mean.tolist()
    return (red, green, blue), float(variance.sqrt())


def normalised(
    moments: Moments, mean: tuple[float, float, float], std: float, patch: int
) -> Moments:
    """The moments of (x - mean) / std."""
    m = moments.sum_x.new_tensor(mean).repeat_interleave(patch**2)  # (D,)
    n = moments.num_tokens
    mixed = torch.outer(m, moments.sum_x)
    return replace(
        moments,
        sum_x=(moments.sum_x - n * m) / std,
        gram=(moments.gram - (mixed + mixed.T) + n * torch.outer(m, m)) / std**2,
        cross=(moments.cross - torch.outer(moments.sum_z, m)) / std,
    )
