"""RGB and normalised Oklab. Pictures are (..., 3, H, W); the sRGB curve is IEC 61966-2-1."""

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

# Ottosson 2020, "A perceptual color space for image processing": linear sRGB -> LMS -> Oklab.
_LMS_FROM_LINEAR = torch.tensor(
    [
        [0.4122214708, 0.5363325363, 0.0514459929],
        [0.2119034982, 0.6806995451, 0.1073969566],
        [0.0883024619, 0.2817188376, 0.6299787005],
    ],
    dtype=torch.float64,
)
_LAB_FROM_LMS = torch.tensor(
    [
        [0.2104542553, 0.7936177850, -0.0040720468],
        [1.9779984951, -2.4285922050, 0.4505937099],
        [0.0259040371, 0.7827717662, -0.8086757660],
    ],
    dtype=torch.float64,
)
# Inverted here and not copied from there: the printed inverses are off by 1e-8.
_LINEAR_FROM_LMS = torch.linalg.inv(_LMS_FROM_LINEAR)
_LMS_FROM_LAB = torch.linalg.inv(_LAB_FROM_LMS)


def rgb_to_oklab(rgb: Tensor) -> Tensor:
    """sRGB in [0, 1] -> Oklab."""
    lms = _mix(_LMS_FROM_LINEAR, _srgb_to_linear(rgb))
    return _mix(_LAB_FROM_LMS, _cube_root_or_zero(lms))


def oklab_to_rgb(lab: Tensor) -> Tensor:
    """Oklab -> sRGB; colours that sRGB does not have are clamped to [0, 1] in linear light."""
    linear = _mix(_LINEAR_FROM_LMS, _mix(_LMS_FROM_LAB, lab) ** 3)
    return _linear_to_srgb(linear.clamp(0, 1))


@dataclass(frozen=True)
class ColorCode:
    """The colour space a model works in: `space`, centred and divided by one number.

    mean and std are in the space's own units, which for rgb are those of [0, 1].
    """

    space: Literal["rgb", "oklab"]
    mean: tuple[float, float, float]
    std: float

    def encode(self, image: Tensor) -> Tensor:
        """RGB in [-1, 1] -> the model's colour space."""
        rgb = (image + 1) / 2
        native = rgb_to_oklab(rgb) if self.space == "oklab" else rgb
        return (native - self._mean(image)) / self.std

    def decode(self, x: Tensor) -> Tensor:
        """The model's colour space -> RGB in [-1, 1] (rgb itself is not clamped)."""
        native = x * self.std + self._mean(x)
        rgb = oklab_to_rgb(native) if self.space == "oklab" else native
        return rgb * 2 - 1

    def _mean(self, like: Tensor) -> Tensor:
        return like.new_tensor(self.mean).view(3, 1, 1)


def _mix(matrix: Tensor, image: Tensor) -> Tensor:
    return torch.einsum("ij,...jhw->...ihw", matrix.to(image), image)


# A power has an infinite or undefined slope where its other branch is taken, and `where` turns
# that into NaN on the way back. So each power only ever sees numbers from its own branch.


def _srgb_to_linear(v: Tensor) -> Tensor:
    curve = ((v.clamp(min=0.04045) + 0.055) / 1.055) ** 2.4
    return torch.where(v <= 0.04045, v / 12.92, curve)


def _linear_to_srgb(v: Tensor) -> Tensor:
    curve = 1.055 * v.clamp(min=0.0031308) ** (1 / 2.4) - 0.055
    return torch.where(v <= 0.0031308, 12.92 * v, curve)


def _cube_root_or_zero(v: Tensor) -> Tensor:
    """Cube root, 0 for v <= 0; there with slope 0, where the true slope is infinite."""
    positive = v > 0
    return torch.where(positive, torch.where(positive, v, 1) ** (1 / 3), 0)
