"""A picture file that a model is to go by -> pixels of the size that its pipeline would make of it.

Shapes: image (3, H, W) uint8 RGB.
"""

import hashlib
import math
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor

from asymlift.artifacts.parsing import read_small
from asymlift.data.pictures import BadPicture, decode_image, resize_image
from asymlift.errors import BadData, Unavailable
from asymlift.families.base import ReferencePictures

MOST_BYTES = 1 << 28  # of a file: what the largest picture that is decoded has as raw RGBA


@dataclass(frozen=True)
class Reference:
    """One picture to go by; equal sha256, equal image."""

    sha256: str  # of the file
    image: Tensor  # (3, h p, w p)


def read_reference(path: Path, rule: ReferencePictures, patch: int) -> Reference:
    """Read and bring to size what the family's pipeline would take; refuse what it would not."""
    data = reference_bytes(path)
    try:
        image = decode_image(data)
    except BadPicture as error:
        raise BadData(f"reference picture {path}: {error}") from None
    height, width = image.shape[-2:]
    shorter, longer = sorted((height, width))
    if shorter < rule.least_side or longer > rule.most_aspect * shorter:
        raise BadData(
            f"reference picture {path}: {width} x {height} pixels; this model takes pictures of at "
            f"least {rule.least_side} pixels a side, at most {rule.most_aspect:g} times as long as "
            "wide"
        )
    return Reference(digest(data), fit_reference(image, rule.most_pixels, patch))


def reference_bytes(path: Path) -> bytes:
    try:
        return read_small(path, MOST_BYTES)
    except FileNotFoundError:
        raise Unavailable(f"reference picture {path}: there is no such file") from None
    except OSError as error:
        raise BadData(f"reference picture {path}: cannot be read: {error.strerror}") from None


def digest(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def fit_reference(image: Tensor, most_pixels: int, patch: int) -> Tensor:
    """Not enlarged; reduced where it is too large; then its middle, a whole number of patches."""
    height, width = image.shape[-2:]
    if height * width > most_pixels:
        scale = math.sqrt(most_pixels / (width * height))
        image = resize_image(image, int(height * scale), int(width * scale))
        height, width = image.shape[-2:]
    rows, columns = height // patch * patch, width // patch * patch
    top, left = (height - rows) // 2, (width - columns) // 2
    return image[:, top : top + rows, left : left + columns]
