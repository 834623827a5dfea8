"""From samples to a training batch: noise, noise level and dropped captions by position.

Everything random is a function of (seed, purpose, global slot), so that it depends neither on the
number of ranks nor on where a run was interrupted.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from asymlift.data.order import derive
from asymlift.data.pictures import image_to_float, resize_image
from asymlift.data.shards import Sample
from asymlift.families.base import Family, Geometry
from asymlift.families.text import text_to
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
            images = torch.stack([self.picture(sample.image, grid) for sample in present])
            x0[good] = image_to_tokens(self.color.encode(images), self.geometry.pixel_patch)
            z0[good] = self.latents(present, images, grid)
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
            text=text_to(self.family.collate(text), self.device),
            grid=grid,
        )

    def picture(self, image: Tensor, grid: tuple[int, int]) -> Tensor:
        """uint8 (3, H, W) -> (3, h p, w p) in [-1, 1] on the device."""
        patch = self.geometry.pixel_patch
        return image_to_float(resize_image(image, grid[0] * patch, grid[1] * patch)).to(self.device)

    def latents(self, samples: list[Sample], images: Tensor, grid: tuple[int, int]) -> Tensor:
        """The cached latents, and the VAE's where there is no cache, as tokens."""
        cached = [sample.latent for sample in samples]
        if any(latent is None for latent in cached):
            assert self.encode_latents is not None, "checked before training begins"
            fresh = iter(self.encode_latents(images[[z is None for z in cached]]))
            cached = [next(fresh) if latent is None else latent for latent in cached]
        stacked = torch.stack([z.to(self.device, torch.float32) for z in cached if z is not None])
        return image_to_tokens(stacked, self.geometry.patch)

    def captions(self, samples: list[Sample], place: Place) -> list[Embedding]:
        kept = [not self.drops(place, sample.key) for sample in samples]
        wanted = [sample for sample, keep in zip(samples, kept, strict=True) if keep]
        if self.encode_captions is not None:
            embeddings = self.encode_captions([sample.caption for sample in wanted])
        else:
            embeddings = [sample.text for sample in wanted if sample.text is not None]
        coming = iter(embeddings)
        return [next(coming) if keep else self.null_text for keep in kept]

    def drops(self, place: Place, key: str) -> bool:
        """Whether this epoch trains this sample on the empty caption."""
        draw = derive(place.seed, "caption dropout", place.epoch, key) / 2**63
        return draw < self.caption_dropout

    def draw(self, seed: int, slot: int, num_tokens: int) -> tuple[Tensor, Tensor]:
        generator = torch.Generator(self.device).manual_seed(derive(seed, "noise", slot))
        eps = torch.randn(num_tokens, self.geometry.D, generator=generator, device=self.device)
        return eps, self.draw_sigma(generator)
