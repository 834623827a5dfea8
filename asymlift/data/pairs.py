"""Aligned tokens: the pixels and the latent of the same cell of the same image.

p pixel patch, q latent patch, (h, w) the token grid, n tokens of an image, all or a sample of them;
x (n, D) pixel tokens in the raw units of a colour space, z (n, d) latent tokens.
"""

import hashlib
import math
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Literal, NamedTuple, TypeVar

import torch
from torch import Tensor

from asymlift.data.order import generator
from asymlift.data.pictures import image_to_float, resize_image
from asymlift.data.shards import BadSample, SampleIndex, ShardReader
from asymlift.maths.color import ColorCode
from asymlift.maths.patches import image_to_tokens

MAX_ENCODED_PIXELS = 1024 * 1024  # latent models of today are trained around one megapixel

Item = TypeVar("Item")
Result = TypeVar("Result")


class Pair(NamedTuple):
    """An image (3, h p, w p) uint8 and its latent (C, h q, w q)."""

    image: Tensor
    latent: Tensor


class PairReader:
    """Reads pairs; may be shared between threads."""

    def __init__(
        self,
        space: Literal["rgb", "oklab"],
        patch: int,
        channels: int,
        latent_patch: int,
        *,
        tokens_per_image: int | None = None,
        encode: Callable[[Tensor], Tensor] | None = None,  # image (1, 3, H, W) in [-1, 1]
        device: torch.device | str = "cpu",  # where colours are converted
    ) -> None:
        self.raw = ColorCode(space, (0.0, 0.0, 0.0), 1.0)
        self.patch, self.channels, self.latent_patch = patch, channels, latent_patch
        self.tokens_per_image = tokens_per_image
        self.encode, self.device = encode, device
        self.reader = ShardReader()
        self.encoding = threading.Lock()  # one image at a time in the autoencoder's memory

    def tokens(self, sample: SampleIndex) -> tuple[Tensor, Tensor]:
        """(x, z) of a sample; BadSample where it cannot serve."""
        image, latent = self.pair(sample)
        pixels, latents = image[None], latent[None]
        total = latent.shape[1] * latent.shape[2] // self.latent_patch**2
        if self.tokens_per_image is not None and self.tokens_per_image < total:
            draw = generator("tokens", sample.key)  # the same ones whatever else is read
            chosen = torch.randperm(total, generator=draw)[: self.tokens_per_image].sort().values
            # Cut the patches out first: nothing but them is converted.
            pixels, latents = (
                patches_at(pixels[0], self.patch, chosen),
                patches_at(latents[0], self.latent_patch, chosen),
            )
        raw = self.raw.encode(image_to_float(pixels.to(self.device)))
        z = image_to_tokens(latents.to(self.device).float(), self.latent_patch)
        return image_to_tokens(raw, self.patch).flatten(0, 1), z.flatten(0, 1)

    def pair(self, sample: SampleIndex) -> Pair:
        """The image, brought to the size that the latent stands for, and the latent."""
        latent, image = self.reader.latent(sample), self.reader.image(sample)
        if latent is None:
            image = self.shrink_to_grid(sample, image)
            latent = self.encoded(sample, image)
            self.check_shape(sample, latent)
            return Pair(image, latent)
        self.check_shape(sample, latent)
        height, width = (side // self.latent_patch * self.patch for side in latent.shape[1:])
        if not same_picture(image.shape[1], image.shape[2], height, width, self.patch):
            found = f"image {image.shape[2]} x {image.shape[1]}"
            raise BadSample(sample.where, "latent of another size", f"{width} x {height}, {found}")
        return Pair(resize_image(image, height, width), latent)

    def encoded(self, sample: SampleIndex, image: Tensor) -> Tensor:
        """What the autoencoder makes of an image whose size fits."""
        if self.encode is None:
            raise BadSample(sample.where, "no cached latent", "and no VAE to make one")
        with self.encoding, torch.inference_mode():
            latent = self.encode(image_to_float(image)[None])[0]
        if not torch.isfinite(latent).all():
            raise BadSample(sample.where, "the VAE's latent holds NaN or infinity")
        return latent

    def shrink_to_grid(self, sample: SampleIndex, image: Tensor) -> Tensor:
        """To whole patches, and to at most a megapixel; never enlarged."""
        height, width = image.shape[1:]
        if min(height, width) < self.patch:
            raise BadSample(sample.where, "image smaller than a patch", f"{width} x {height}")
        shrink = min(1.0, math.sqrt(MAX_ENCODED_PIXELS / (height * width)))
        rows, columns = (
            max(1, int(side * shrink) // self.patch) * self.patch for side in (height, width)
        )
        return resize_image(image, rows, columns)

    def check_shape(self, sample: SampleIndex, latent: Tensor) -> None:
        shape = tuple(latent.shape)
        if not latent.is_floating_point():
            raise BadSample(sample.where, "latent has the wrong dtype", str(latent.dtype))
        if shape[0] != self.channels:
            counts = f"{shape[0]}, the model reads {self.channels}"
            raise BadSample(sample.where, "latent has the wrong number of channels", counts)
        if 0 in shape or shape[1] % self.latent_patch or shape[2] % self.latent_patch:
            need = f"{shape}, not whole {self.latent_patch} x {self.latent_patch} patches"
            raise BadSample(sample.where, "latent has the wrong shape", need)

    def disagreement(self, sample: SampleIndex) -> float:
        """How far the cached latent is from what the autoencoder makes of the image, in energy.

        0 for the same image, about 2 for an image that has nothing to do with it.
        """
        image, cached = self.pair(sample)
        made = self.encoded(sample, image).to(cached.device).double()
        return float((cached.double() - made).square().sum() / made.square().sum())


def patches_at(image: Tensor, patch: int, chosen: Tensor) -> Tensor:
    """Some patches of (c, H, W), by their place in the grid read row by row: (n, c, p, p)."""
    grid = image.unfold(1, patch, patch).unfold(2, patch, patch)  # (c, h, w, p, p)
    columns = grid.shape[2]
    return grid[:, chosen // columns, chosen % columns].transpose(0, 1)


def same_picture(height: int, width: int, new_height: int, new_width: int, patch: int) -> bool:
    """Whether one scale for both sides, then cutting or rounding to whole patches, explains it."""
    low = max((new_height - patch / 2) / height, (new_width - patch / 2) / width)
    high = min((new_height + patch) / height, (new_width + patch) / width)
    return low < high


def in_hash_order(samples: Iterable[SampleIndex]) -> list[SampleIndex]:
    """A shuffle that depends on nothing but the keys."""

    def place(sample: SampleIndex) -> tuple[bytes, str]:
        return hashlib.sha256(sample.key.encode()).digest(), sample.key

    return sorted(samples, key=place)


def read_ahead(
    read: Callable[[Item], Result], items: Iterable[Item], workers: int
) -> Iterator[Result]:
    """`map` in order, with threads that are at most two items each ahead."""
    if workers == 0:
        yield from map(read, items)
        return
    pool = ThreadPoolExecutor(workers, thread_name_prefix="read")
    coming: deque[Future[Result]] = deque()
    try:
        for item in items:
            coming.append(pool.submit(read, item))
            if len(coming) > 2 * workers:
                yield coming.popleft().result()
        while coming:
            yield coming.popleft().result()
    finally:
        pool.shutdown(cancel_futures=True)
