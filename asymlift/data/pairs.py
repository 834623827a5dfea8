"""Aligned tokens: the pixels and the latent of the same cell of the same image.

p pixel patch, q latent patch, (h, w) the token grid, n tokens of an image, all or a sample of them;
x (n, D) pixel tokens in the raw units of a colour space, z (n, d) latent tokens.
"""

import threading
from collections.abc import Callable, Sequence
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from asymlift.data.order import generator
from asymlift.data.pictures import image_to_float
from asymlift.data.reader import Reader
from asymlift.data.records import BadSample, Record
from asymlift.families.base import Geometry
from asymlift.maths.color import ColorCode
from asymlift.maths.patches import image_to_tokens


class Pair(NamedTuple):
    """An image (3, h p, w p) uint8 and its latent (C, h q, w q)."""

    image: Tensor
    latent: Tensor


class PairReader:
    """Reads pairs; may be shared between threads."""

    def __init__(
        self,
        space: Literal["rgb", "oklab"],
        geometry: Geometry,
        *,
        tokens_per_image: int | None = None,
        encode: Callable[[Tensor], Tensor] | None = None,  # image (1, 3, H, W) in [-1, 1]
        device: torch.device | str = "cpu",  # where colours are converted
    ) -> None:
        self.raw = ColorCode(space, (0.0, 0.0, 0.0), 1.0)
        self.geometry, self.tokens_per_image = geometry, tokens_per_image
        self.encode, self.device = encode, device
        self.reader = Reader()
        self.encoding = threading.Lock()  # one image at a time in the autoencoder's memory

    def tokens(self, record: Record) -> tuple[Tensor, Tensor]:
        """(x, z) of a sample; BadSample where it cannot serve."""
        image, latent = self.pair(record)
        pixels, latents = image[None], latent[None]
        p, q = self.geometry.pixel_patch, self.geometry.patch
        total = latent.shape[1] * latent.shape[2] // q**2
        if self.tokens_per_image is not None and self.tokens_per_image < total:
            draw = generator("tokens", record.key)  # the same ones whatever else is read
            chosen = torch.randperm(total, generator=draw)[: self.tokens_per_image].sort().values
            # Cut the patches out first: nothing but them is converted.
            pixels = patches_at(pixels[0], p, chosen)
            latents = patches_at(latents[0], q, chosen)
        raw = self.raw.encode(image_to_float(pixels.to(self.device)))
        z = image_to_tokens(latents.to(self.device).float(), q)
        return image_to_tokens(raw, p).flatten(0, 1), z.flatten(0, 1)

    def pair(self, record: Record) -> Pair:
        """The image at the size that the model sees, and its latent."""
        latent, image = self.reader.latent(record), self.reader.image(record)
        if latent is None:
            latent = self.encoded(record, image)
        check_latent(record, latent, image.shape[-2:], self.geometry)
        return Pair(image, latent)

    def encoded(self, record: Record, image: Tensor) -> Tensor:
        """What the autoencoder makes of an image whose size fits."""
        if self.encode is None:
            raise BadSample(record.where, "no cached latent", "and no VAE to make one")
        with self.encoding, torch.inference_mode():
            latent = self.encode(image_to_float(image)[None])[0]
        if not torch.isfinite(latent).all():
            raise BadSample(record.where, "the VAE's latent holds NaN or infinity")
        return latent

    def disagreement(self, record: Record) -> float:
        """How far the cached latent is from what the autoencoder makes of the image, in energy.

        0 for the same image, about 2 for an image that has nothing to do with it.
        """
        image, cached = self.pair(record)
        made = self.encoded(record, image).to(cached.device).double()
        return float((cached.double() - made).square().sum() / made.square().sum())


def patches_at(image: Tensor, patch: int, chosen: Tensor) -> Tensor:
    """Some patches of (c, H, W), by their place in the grid read row by row: (n, c, p, p)."""
    grid = image.unfold(1, patch, patch).unfold(2, patch, patch)  # (c, h, w, p, p)
    columns = grid.shape[2]
    return grid[:, chosen // columns, chosen % columns].transpose(0, 1)


def check_latent(record: Record, latent: Tensor, size: Sequence[int], geometry: Geometry) -> None:
    """Raise BadSample unless this is the shape of the latent of an image (height, width)."""
    channels, p, q = geometry.channels, geometry.pixel_patch, geometry.patch
    if latent.shape[0] != channels:
        counts = f"{latent.shape[0]}, the model reads {channels}"
        raise BadSample(record.where, "latent has the wrong number of channels", counts)
    height, width = size
    expected = (height // p * q, width // p * q)
    if tuple(latent.shape[1:]) != expected:
        said = f"{tuple(latent.shape)}, a {width} x {height} image needs {(channels, *expected)}"
        raise BadSample(record.where, "latent has the wrong shape", said)
