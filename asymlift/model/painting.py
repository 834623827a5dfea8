"""A model, a canvas and the indices of some pictures -> these pictures.

Noise belongs to (seed, index): an index drawn by the latent model and by the pixel model begins
with the same noise. B pictures of H x W pixels, N = h w tokens.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from asymlift.artifacts.lifted_folder import Lifted
from asymlift.families.base import Geometry, Text
from asymlift.families.references import with_references
from asymlift.maths.patches import image_to_tokens, tokens_to_image
from asymlift.maths.schedule import tau_from_sigma
from asymlift.maths.solver import OnStep
from asymlift.model.pixel_flow import LatentFlow, PixelFlow
from asymlift.model.sampling import (
    SampleSettings,
    latent_noise,
    noise_for,
    pixel_noise,
    sample_latents,
    sample_pixels,
)

# (indices, text, what guidance goes against, on_step) -> (B, 3, H, W) in [-1, 1]
Painter = Callable[[Sequence[int], Text, Text | None, OnStep | None], Tensor]


@dataclass(frozen=True)
class Canvas:
    """What all pictures of a run share."""

    height: int
    width: int
    seed: int
    settings: SampleSettings
    sigmas: Tensor  # pixel noise levels
    references: tuple[Tensor, ...] = ()  # pictures to go by, (1, 3, h_i p, w_i p) in [-1, 1]

    def grid(self, geometry: Geometry) -> tuple[int, int]:
        p = geometry.pixel_patch
        return self.height // p, self.width // p

    def noise(self, geometry: Geometry, indices: Sequence[int]) -> Tensor:
        """(B, N, D), on the CPU."""
        return pixel_noise(self.seed, indices, self.height, self.width, geometry.pixel_patch)


def going_by(references: Sequence[Tensor], paint: Painter) -> Painter:
    """Let it paint beside these pictures, the same for all; those without a prompt have them too.

    That is how pipelines guide: away from what the prompt adds, not from what the pictures do.
    """

    def paint_beside(
        indices: Sequence[int], text: Text, null_text: Text | None, on_step: OnStep | None
    ) -> Tensor:
        each = [one.expand(len(indices), -1, -1, -1) for one in references]
        null_text = None if null_text is None else with_references(null_text, each)
        return paint(indices, with_references(text, each), null_text, on_step)

    return paint_beside if references else paint


def pixel_painter(
    flow: PixelFlow, lifted: Lifted, canvas: Canvas, against: PixelFlow | None = None
) -> Painter:
    """Draw with a pixel model, whatever weights it has by now; guide against another, if given."""
    geometry = flow.geometry
    references = [lifted.color.encode(image.to(flow.A)) for image in canvas.references]

    def paint(
        indices: Sequence[int], text: Text, null_text: Text | None, on_step: OnStep | None
    ) -> Tensor:
        return sample_pixels(
            flow,
            canvas.noise(geometry, indices).to(flow.A),
            text,
            null_text,
            canvas.sigmas,
            canvas.settings,
            lifted.color,
            canvas.grid(geometry),
            on_step,
            against,
        )

    return going_by(references, paint)


def latent_painter(
    flow: LatentFlow,
    vae: Any,
    lifted: Lifted | None,
    canvas: Canvas,
    device: torch.device,
    against: LatentFlow | None = None,
) -> Painter:
    """Draw with the latent model and decode by its VAE; guide against another model, if given.

    With a lifted model beside it, from the noise that this one sees in pixels, and on the same
    steps; alone, from noise of its own, `canvas.sigmas` being its own levels.
    """
    geometry, grid = flow.geometry, canvas.grid(flow.geometry)
    taus = tau_from_sigma(canvas.sigmas, lifted.s) if lifted else canvas.sigmas
    references = [flow.family.encode_latents(vae, image.to(device)) for image in canvas.references]

    def noise(indices: Sequence[int]) -> Tensor:
        if lifted:
            return latent_noise(canvas.noise(geometry, indices), lifted.A)
        shape = (geometry.channels, *(side * geometry.patch for side in grid))
        maps = [noise_for(canvas.seed, index, shape) for index in indices]
        return image_to_tokens(torch.stack(maps), geometry.patch)

    @torch.no_grad()
    def paint(
        indices: Sequence[int], text: Text, null_text: Text | None, on_step: OnStep | None
    ) -> Tensor:
        z = noise(indices).to(device)
        z = sample_latents(flow, z, text, null_text, taus, canvas.settings, grid, on_step, against)
        latent = tokens_to_image(z, geometry.patch, grid)
        image: Tensor = flow.family.decode_latents(vae, latent)
        return image

    return going_by(references, paint)
