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
from asymlift.model.rows import Rows, moved
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
        draw_sigma: Callable[[Place, tuple[int, int]], Tensor],
        encode_latents: Callable[[Tensor], Tensor] | None,
        encode_captions: Callable[[list[str]], list[Embedding]] | None,
    ) -> None:
        self.family, self.geometry, self.color, self.device = family, geometry, color, device
        self.null_text, self.caption_dropout = null_text, caption_dropout
        self.draw_sigma = draw_sigma
        self.encode_latents, self.encode_captions = encode_latents, encode_captions

    def make(self, samples: Sequence[Sample | None], place: Place, grid: tuple[int, int]) -> Batch:
        good = [position for position, sample in enumerate(samples) if sample is not None]
        present = [sample for sample in samples if sample is not None]
        num_tokens, patch = grid[0] * grid[1], self.geometry.pixel_patch
        weight = torch.zeros(len(samples))
        weight[good] = 1
        text = [self.null_text] * len(samples)
        for position, embedding in zip(good, self.captions(present, place), strict=True):
            text[position] = embedding
        x0, z0 = self.tokens(present, Rows(good, len(samples), self.device), num_tokens)
        return Batch(
            x0=x0,
            z0=z0,
            eps=self.noise(place, num_tokens),
            sigma=self.draw_sigma(place, (grid[0] * patch, grid[1] * patch)),
            weight=weight,
            text=self.family.collate([self.alike(embedding) for embedding in text]),
            grid=grid,
        )

    def tokens(self, present: list[Sample], rows: Rows, num_tokens: int) -> tuple[Tensor, Tensor]:
        """Clean pixel and latent tokens; those of empty slots are zero."""
        if not present:
            widths = (self.geometry.D, self.geometry.d)
            x0, z0 = (torch.zeros(rows.count, num_tokens, n, device=self.device) for n in widths)
            return x0, z0
        images = image_to_float(moved(torch.stack([s.image for s in present]), self.device))
        pixels = image_to_tokens(self.color.encode(images), self.geometry.pixel_patch)
        return rows.spread(pixels), rows.spread(self.latents(present, images))

    def latents(self, samples: list[Sample], images: Tensor) -> Tensor:
        """The cached latents, and the VAE's where there is no cache, as tokens."""
        cached = [sample.latent for sample in samples]
        if any(latent is None for latent in cached):
            assert self.encode_latents is not None, "checked before training begins"
            fresh = iter(self.encode_latents(images[[z is None for z in cached]]))
            cached = [next(fresh) if latent is None else latent for latent in cached]
        whole = [moved(z.to(torch.float32), self.device) for z in cached if z is not None]
        return image_to_tokens(torch.stack(whole), self.geometry.patch)

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
            name: moved(tensor.to(self.null_text[name].dtype), self.device)
            for name, tensor in embedding.items()
        }

    def noise(self, place: Place, num_tokens: int) -> Tensor:
        """(B, N, D), each slot from a generator of its own."""
        eps = torch.empty(len(place.slots), num_tokens, self.geometry.D, device=self.device)
        for row, slot in zip(eps, place.slots, strict=True):
            seed = derive(place.seed, "noise", slot)
            row.normal_(generator=torch.Generator(self.device).manual_seed(seed))
        return eps
