"""One forward pass of finetuning: batch in, loss out (method, section 5).

B samples, N tokens of width D (pixels) or d (latents), grid (h, w).
"""

from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from asymlift.families.base import Text
from asymlift.maths.flow import clean_from_velocity, low_rank_image, mix
from asymlift.maths.loss import (
    control_variate,
    corrected_target,
    flow_loss,
    low_noise_weight,
    perceptual_gate,
    perceptual_loss,
)
from asymlift.maths.patches import tokens_to_image
from asymlift.model.perceptual import Perceptual
from asymlift.model.pixel_flow import PixelFlow
from asymlift.model.reference import as_reference


@dataclass(frozen=True)
class LossConstants:
    """Every constant of the loss; the published values are the recipe's defaults."""

    shift: float
    weight: float
    sigma_clamp: float
    control_floor: float
    student_floor: float
    reference_floor: float
    perceptual_weight: float
    reduces_variance: bool


@dataclass
class Batch:
    """What one rank computes in one forward pass; everything on the device."""

    x0: Tensor  # (B, N, D) clean pixel tokens in the model's colour space
    z0: Tensor  # (B, N, d) clean latent tokens
    eps: Tensor  # (B, N, D)
    sigma: Tensor  # (B,)
    weight: Tensor  # (B,) 1 for a good sample, 0 for an empty slot
    text: Text
    grid: tuple[int, int]


class TrainingStep(nn.Module):
    """Student, reference and losses in one module, so that one engine owns them all."""

    def __init__(
        self,
        student: PixelFlow,
        reference: PixelFlow | None,
        constants: LossConstants,
        to_picture: Callable[[Tensor], Tensor],
        perceptual: Perceptual | None,
    ) -> None:
        super().__init__()
        self.student = student
        self.reference_copy = reference  # None: the student's own frozen weights
        self.constants = constants
        self.to_picture = to_picture  # the model's colour space -> RGB in [-1, 1]
        self.perceptual = [perceptual]  # in a list: its weights are no part of this module

    def forward(self, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
        """The SUM of the samples' losses, and sums of what is worth logging."""
        with torch.autocast(batch.x0.device.type, enabled=False):
            return self.losses(batch)

    def losses(self, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
        use, sigma = self.constants, batch.sigma
        x_t = mix(batch.x0, batch.eps, sigma)
        u = self.student(x_t, sigma, batch.text, batch.grid, floor=use.student_floor)
        x0_hat = clean_from_velocity(x_t, u, sigma)
        w = low_noise_weight(sigma, use.shift)

        target, gate, logged = batch.x0, None, {}
        if use.reduces_variance:
            A, s = self.student.A, self.student.s
            x0_low = low_rank_image(batch.z0, A, s)
            x0_low_hat = self.denoise_low(x0_low, batch)
            c = control_variate(
                batch.x0, x0_hat.detach(), x0_low, x0_low_hat, floor=use.control_floor
            )
            target = corrected_target(batch.x0, x0_low, x0_low_hat, c, w)
            gate = perceptual_gate(c)
            logged["control"] = c.mean(dim=(1, 2, 3))

        flow = flow_loss(x0_hat, target, sigma, weight=use.weight, sigma_clamp=use.sigma_clamp)
        logged["loss_flow"] = flow.detach()
        loss = flow
        measure = self.perceptual[0]
        if measure is not None:
            distance = self.distance_map(measure, x0_hat, batch)
            perceptual = perceptual_loss(
                distance,
                torch.ones_like(batch.x0[..., 0]) if gate is None else gate,
                w,
                sigma,
                batch.grid,
                self.student.geometry.pixel_patch,
                weight=use.perceptual_weight,
                sigma_clamp=use.sigma_clamp,
            )
            logged["loss_perceptual"] = perceptual.detach()
            loss = loss + perceptual
        sums = {name: (value * batch.weight).sum() for name, value in logged.items()}
        return (loss * batch.weight).sum(), sums

    def denoise_low(self, x0_low: Tensor, batch: Batch) -> Tensor:
        """What the model as converted makes of the low-rank image under the same noise."""
        x_t = mix(x0_low, batch.eps, batch.sigma)
        copied = self.reference_copy
        branch = as_reference(self.student.net) if copied is None else nullcontext()
        with torch.no_grad(), branch:
            u = (copied or self.student)(
                x_t, batch.sigma, batch.text, batch.grid, floor=self.constants.reference_floor
            )
        return clean_from_velocity(x_t, u, batch.sigma)

    def distance_map(self, measure: Perceptual, x0_hat: Tensor, batch: Batch) -> Tensor:
        patch, precision = self.student.geometry.pixel_patch, self.student.precision
        # Colours in float32: rounded before Oklab's matrices they are off by up to a fifth.
        made, real = (
            self.to_picture(tokens_to_image(tokens, patch, batch.grid))
            for tokens in (x0_hat, batch.x0)
        )
        with torch.autocast(
            x0_hat.device.type, dtype=precision or torch.bfloat16, enabled=precision is not None
        ):
            return measure(made, real).float()
