"""From samples to a training batch: noise, noise level and dropped captions by position.

Everything random is a function of (seed, purpose, global slot), so that it depends neither on the
number of ranks nor on where a run was interrupted.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from asymlift.data.captions import is_dropped
from asymlift.data.order import derive
from asymlift.data.pictures import image_to_float
from asymlift.data.records import Sample
from asymlift.families.base import Family, Geometry
from asymlift.maths.color import ColorCode
from asymlift.maths.patches import image_to_tokens
from asymlift.model.training_step import Batch

Embedding = dict[str, Tensor]


@dataclass(frozen=True)
class Place:
    """Where in the run a micro-batch stands."""

    seed: int
    epoch: int
    slots: Sequence[int]  # global: step * batch + position


class BatchMaker:
    """Puts samples of one size on the device, in the spaces that the model works in."""

    def __init__(
        self,
        family: Family,
        geometry: Geometry,
        color: ColorCode,
        device: torch.device,
        *,
        null_text: Embedding,
        caption_dropout: float,
        draw_sigma: Callable[[torch.Generator], Tensor],
        encode_latents: Callable[[Tensor], Tensor] | None,
        encode_captions: Callable[[list[str]], list[Embedding]] | None,
    ) -> None:
        self.family, self.geometry, self.color, self.device = family, geometry, color, device
        self.null_text, self.caption_dropout = null_text, caption_dropout
        self.draw_sigma = draw_sigma
        self.encode_latents, self.encode_captions = encode_latents, encode_captions

    def make(self, samples: Sequence[Sample | None], place: Place, grid: tuple[int, int]) -> Batch:
        rows, columns = grid
        num_tokens = rows * columns
        x0 = torch.zeros(len(samples), num_tokens, self.geometry.D, device=self.device)
        z0 = torch.zeros(len(samples), num_tokens, self.geometry.d, device=self.device)
        good = [position for position, sample in enumerate(samples) if sample is not None]
        present = [sample for sample in samples if sample is not None]
        if present:
            images = torch.stack([self.picture(sample.image) for sample in present])
            x0[good] = image_to_tokens(self.color.encode(images), self.geometry.pixel_patch)
            z0[good] = self.latents(present, images)
        text = [self.null_text] * len(samples)
        for position, embedding in zip(good, self.captions(present, place), strict=True):
            text[position] = embedding
        draws = [self.draw(place.seed, slot, num_tokens) for slot in place.slots]
        weight = torch.zeros(len(samples), device=self.device)
        weight[good] = 1
        return Batch(
            x0=x0,
            z0=z0,
            eps=torch.stack([eps for eps, _ in draws]),
            sigma=torch.stack([sigma for _, sigma in draws]),
            weight=weight,
            text=self.family.collate([self.alike(embedding) for embedding in text]),
            grid=grid,
        )

    def picture(self, image: Tensor) -> Tensor:
        """uint8 (3, h p, w p) -> the same in [-1, 1] on the device."""
        return image_to_float(image.to(self.device))

    def latents(self, samples: list[Sample], images: Tensor) -> Tensor:
        """The cached latents, and the VAE's where there is no cache, as tokens."""
        cached = [sample.latent for sample in samples]
        if any(latent is None for latent in cached):
            assert self.encode_latents is not None, "checked before training begins"
            fresh = iter(self.encode_latents(images[[z is None for z in cached]]))
            cached = [next(fresh) if latent is None else latent for latent in cached]
        stacked = torch.stack([z.to(self.device, torch.float32) for z in cached if z is not None])
        return image_to_tokens(stacked, self.geometry.patch)

    def captions(self, samples: list[Sample], place: Place) -> list[Embedding]:
        """The cached embeddings, and the encoder's where there is no cache."""
        kept = [
            not is_dropped(self.caption_dropout, place.seed, place.epoch, sample.key)
            for sample in samples
        ]
        wanted = [sample for sample, keep in zip(samples, kept, strict=True) if keep]
        missing = [sample.caption for sample in wanted if sample.text is None]
        fresh: Iterator[Embedding] = iter([])
        if missing:
            assert self.encode_captions is not None, "checked before training begins"
            fresh = iter(self.encode_captions(missing))
        coming = iter([next(fresh) if s.text is None else s.text for s in wanted])
        return [next(coming) if keep else self.null_text for keep in kept]

    def alike(self, embedding: Embedding) -> Embedding:
        """On the device, in the dtypes of the empty prompt's: caches may store others."""
        return {
            name: tensor.to(self.device, self.null_text[name].dtype)
            for name, tensor in embedding.items()
        }

    def draw(self, seed: int, slot: int, num_tokens: int) -> tuple[Tensor, Tensor]:
        generator = torch.Generator(self.device).manual_seed(derive(seed, "noise", slot))
        eps = torch.randn(num_tokens, self.geometry.D, generator=generator, device=self.device)
        return eps, self.draw_sigma(generator)
