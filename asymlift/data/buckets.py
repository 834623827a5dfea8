"""Aspect buckets: which (height, width) the model sees of a picture, and how it is cut to it.

Shapes: image (3, H, W) uint8.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache, lru_cache

import numpy as np
from PIL import Image
from torch import Tensor

from asymlift.data.order import Ints
from asymlift.data.pictures import picture_to_tensor, tensor_to_picture
from asymlift.errors import BadRecipe

Bucket = tuple[int, int]  # (height, width)

STEPS_PER_SIDE = 16  # so a 1024-pixel side has steps of 64, as SDXL's buckets do
ENOUGH = 0.9  # a suggestion that keeps this share of the refused pictures is good enough


@dataclass(frozen=True)
class Fit:
    """How pictures are brought to a few sizes; `data.resize` in a recipe."""

    sides: tuple[int, ...]  # target areas are side**2; kept largest first
    patch: int  # p, pixels per token
    step: int | None = None  # bucket sides are multiples of it; None: see step_of
    max_aspect: float = 2.0  # long / short
    min_side: int | None = None
    upscale: bool = False

    def __post_init__(self) -> None:
        object.__setattr__(self, "sides", tuple(sorted(self.sides, reverse=True)))
        if not self.sides:
            raise BadRecipe("data.resize.sides is empty; name at least one side, such as [1024]")
        if len(set(self.sides)) < len(self.sides):
            raise BadRecipe(f"data.resize.sides names a side twice: {list(self.sides)}")
        if self.step is not None and (self.step < 1 or self.step % self.patch):
            raise BadRecipe(
                f"data.resize.step {self.step} is not a multiple of the {self.patch}-pixel patch"
            )
        for side in self.sides:
            if side < self.patch:
                raise BadRecipe(
                    f"data.resize.sides: {side} is smaller than one {self.patch}-pixel patch"
                )
            if side < step_of(side, self):
                raise BadRecipe(
                    f"data.resize.sides: {side} is smaller than data.resize.step {self.step}"
                )
        if not self.max_aspect >= 1:
            raise BadRecipe(
                f"data.resize.max_aspect {self.max_aspect} is less than 1, which is a square"
            )


@dataclass(frozen=True)
class Refusal:
    """Why a picture is not used; `reason` is short and fixed, so that it can be counted."""

    reason: str
    detail: str


def step_of(side: int, fit: Fit) -> int:
    """The grid that the buckets of `side` lie on."""
    if fit.step is not None:
        return fit.step
    return -(-side // (STEPS_PER_SIDE * fit.patch)) * fit.patch


@cache
def buckets(fit: Fit) -> Mapping[int, tuple[Bucket, ...]]:
    """The buckets of every side: for each width the largest height within side**2, and each
    of them transposed; always the largest square, never more than max_aspect."""
    return {side: buckets_of(side, fit) for side in fit.sides}


def buckets_of(side: int, fit: Fit) -> tuple[Bucket, ...]:
    step = step_of(side, fit)
    square = side // step * step
    found = {(square, square)}
    for width in range(step, side**2 // step + 1, step):
        height = side**2 // width // step * step
        if height and max(height, width) <= fit.max_aspect * min(height, width):
            found |= {(height, width), (width, height)}
    return tuple(sorted(found))


@lru_cache(maxsize=2**16)
def place(width: int, height: int, fit: Fit) -> Bucket | Refusal:
    """The bucket of an upright picture.

    The largest side of which the picture covers a bucket without being enlarged; among the
    buckets of that side that it covers, the one with the nearest aspect. A picture that has the
    size of a bucket gets that one. With `upscale`, a picture that covers none gets the nearest
    aspect of the smallest side.
    """
    long, short = max(width, height), min(width, height)
    if long > fit.max_aspect * short:
        limit = f"{fit.max_aspect:g} to 1 (data.resize.max_aspect)"
        return Refusal("too elongated", f"{width} x {height}, the limit is {limit}")
    if fit.min_side is not None and short < fit.min_side:
        limit = f"{fit.min_side} (data.resize.min_side)"
        return Refusal("too small", f"{width} x {height}, the shorter side must be {limit}")

    by_side = buckets(fit)
    if any((height, width) in group for group in by_side.values()):
        return height, width
    for group in by_side.values():
        covered = [bucket for bucket in group if bucket[0] <= height and bucket[1] <= width]
        if covered:
            return nearest(width, height, covered)

    smallest = nearest(width, height, by_side[fit.sides[-1]])
    if fit.upscale:
        return smallest
    needed = f"{smallest[1]} x {smallest[0]} (data.resize)"
    return Refusal("too small", f"{width} x {height}, the smallest bucket that fits is {needed}")


def places(sizes: Ints, fit: Fit) -> Ints:
    """`place` of many at once: (n, 2) widths and heights -> heights and widths; 0 where refused.

    A million different sizes take 0.4 s; one by one they take 10.
    """
    widths, heights = sizes.astype(np.int64).reshape(-1, 2).T
    long, short = np.maximum(widths, heights), np.minimum(widths, heights)
    waiting = (short >= max(fit.min_side or 0, 1)) & (long <= fit.max_aspect * short)
    by_side = buckets(fit)
    exact = [height << 32 | width for group in by_side.values() for height, width in group]
    fits = waiting & np.isin(heights << 32 | widths, exact)
    found = np.where(fits[:, None], np.stack([heights, widths], 1), 0)
    waiting &= ~fits
    tries = [(group, True) for group in by_side.values()]
    if fit.upscale:
        tries.append((by_side[fit.sides[-1]], False))
    for group, covered in tries:
        some = np.flatnonzero(waiting)
        found[some] = nearest_of_many(widths[some], heights[some], group, covered=covered)
        waiting[some] = found[some, 0] == 0
    return found.astype(np.int32)


def nearest_of_many(widths: Ints, heights: Ints, among: Iterable[Bucket], *, covered: bool) -> Ints:
    """`nearest` of each, if need be among those that it covers; 0 where there is none."""
    found = np.zeros((len(widths), 2), np.int64)
    least = np.full(len(widths), np.inf)
    for bucket in sorted(among, key=rank_of_equals):
        one, other = widths * bucket[0], heights * bucket[1]
        loss = np.maximum(one, other) / np.minimum(one, other)
        better = loss < least
        if covered:
            better &= (bucket[0] <= heights) & (bucket[1] <= widths)
        least[better] = loss[better]
        found[better] = bucket
    return found


def nearest(width: int, height: int, among: Iterable[Bucket]) -> Bucket:
    """The bucket whose aspect is nearest in the logarithm, which is the one that crops least.

    Equally near ones: see `rank_of_equals`.
    """

    def loss(bucket: Bucket) -> tuple[float, int, int]:
        one, other = width * bucket[0], height * bucket[1]
        return max(one, other) / min(one, other), *rank_of_equals(bucket)

    return min(among, key=loss)


def rank_of_equals(bucket: Bucket) -> tuple[int, int]:
    """The larger first, then the less elongated: a transposed picture gets the transposed one."""
    return -bucket[0] * bucket[1], max(bucket)


def suggestion(sizes: Sequence[tuple[int, int]] | Ints, fit: Fit) -> str:
    """What to change for (width, height) that were too small, in one sentence with numbers.

    The first that keeps nine in ten of: no min_side, smaller sides, upscale; else the best.
    """
    options: dict[str, Fit] = {}
    if fit.min_side is not None:
        options["data.resize.min_side: null"] = replace(fit, min_side=None)
    sides = fit.sides
    while sides[-1] // 2 >= max(fit.patch, fit.step or 0):
        sides = (*sides, sides[-1] // 2)
        options[f"data.resize.sides: {list(sides)}"] = replace(fit, sides=sides)
    options["data.resize.upscale: true"] = replace(fit, upscale=True)

    kept = {
        text: np.count_nonzero(places(np.asarray(sizes), option)[:, 0])
        for text, option in options.items()
    }
    enough = (text for text, number in kept.items() if number >= ENOUGH * len(sizes))
    best = next(enough, max(kept, key=lambda text: kept[text]))
    return f"{best} would keep {kept[best]} of {len(sizes)}"


def whole_patches(width: int, height: int, patch: int) -> Bucket | Refusal:
    """(height, width) of what is left of a picture that keeps its size."""
    if min(width, height) < patch:
        return Refusal("smaller than one patch", f"{width} x {height}, a patch has {patch} pixels")
    return height // patch * patch, width // patch * patch


def fit_image(image: Tensor, height: int, width: int) -> Tensor:
    """Scaled by Lanczos until it just covers (height, width), then cut around its centre.

    At scale 1 pixels are only cut away (the odd one right or below), never changed.
    """
    full_height, full_width = image.shape[-2:]
    if (full_height, full_width) == (height, width):
        return image
    if min(full_height - height, full_width - width) == 0:
        y, x = (full_height - height) // 2, (full_width - width) // 2
        return image[:, y : y + height, x : x + width].contiguous()

    # What is kept of the original, in its own pixels: one of its sides is kept whole.
    kept_height = min(full_height, height * full_width / width)
    kept_width = min(full_width, width * full_height / height)
    top, left = (full_height - kept_height) / 2, (full_width - kept_width) / 2
    picture = tensor_to_picture(image).resize(
        (width, height),
        Image.Resampling.LANCZOS,
        box=(left, top, full_width - left, full_height - top),
    )
    return picture_to_tensor(picture)
