"""One forward pass of finetuning: batch in, loss out (method, section 5).

B samples, N tokens of width D (pixels) or d (latents), grid (h, w).
"""

from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from asymlift.families.base import Text
from asymlift.maths.diagnostics import error_energies, sums_by_level
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
from asymlift.model.last_map import gradient_sums, watched_last_map
from asymlift.model.perceptual import Perceptual
from asymlift.model.pixel_flow import PixelFlow
from asymlift.model.reference import as_reference
from asymlift.model.rows import Rows, moved

NUM_LEVELS = 8  # equal shares of sigma that losses are told apart by


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
    skip_below: float  # a pass leaves out samples whose share of it is not above this
    same_passes: bool  # ZeRO-3: every rank has to run the same forward passes


@dataclass
class Batch:
    """What one rank computes in one forward pass.

    Everything is on the device but noise level and weight: they decide what is computed, and a
    GPU that has to be asked is a GPU that waits.
    """

    x0: Tensor  # (B, N, D) clean pixel tokens in the model's colour space
    z0: Tensor  # (B, N, d) clean latent tokens
    eps: Tensor  # (B, N, D)
    sigma: Tensor  # (B,)
    weight: Tensor  # (B,) 1 for a good sample, 0 for an empty slot
    text: Text
    grid: tuple[int, int]
    measures: bool = False  # also what the gradient's variance is made of


@dataclass
class Control:
    """What the reference says of some samples: rows, and (b, N, ...) tensors of those."""

    rows: Rows
    x0: Tensor
    x0_hat: Tensor
    x0_low: Tensor
    x0_low_hat: Tensor
    c: Tensor  # (b, N, 3, 1)


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
        """The SUM of the samples' losses, and sums of what is worth logging.

        Which sums there are depends on the settings alone, never on the samples.
        """
        with torch.autocast(batch.x0.device.type, enabled=False):
            loss, sums = self.losses(batch)
        # An infinite loss can have finite gradients; then nobody would leave the update out.
        return loss * torch.where(loss.detach().isfinite(), 1.0, torch.nan), sums

    def losses(self, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
        use, device = self.constants, batch.x0.device
        sigma, good = moved(batch.sigma, device), moved(batch.weight, device)
        x_t = mix(batch.x0, batch.eps, sigma)
        with watched_last_map(self.student, batch.measures) as read:
            u = self.student(x_t, sigma, batch.text, batch.grid, floor=use.student_floor)
        x0_hat = clean_from_velocity(x_t, u, sigma)
        w = low_noise_weight(sigma, use.shift)

        compared, looked_at = self.chosen(batch)
        target, sums = batch.x0, dict[str, Tensor]()
        control = self.control(batch, x0_hat.detach(), sigma, compared)
        if control is not None:
            target = self.corrected(batch.x0, control, w)
        if use.reduces_variance:
            sums |= self.told(control, good)
        flow = flow_loss(x0_hat, target, sigma, weight=use.weight, sigma_clamp=use.sigma_clamp)
        sums["loss_flow"] = (flow.detach() * good).sum()
        loss = flow
        if self.perceptual[0] is not None:
            perceptual = self.perceptual_term(batch, x0_hat, w, sigma, control, looked_at)
            sums["loss_perceptual"] = (perceptual.detach() * good).sum()
            sums["num_looked_at"] = good.new_full((), len(looked_at))
            loss = loss + perceptual
        values, count = sums_by_level(loss.detach(), good, sigma, NUM_LEVELS)
        sums |= {"loss_by_sigma": values, "num_by_sigma": count}
        if read:
            sums |= self.variance_sums(batch, read, x_t, x0_hat, sigma, target, good)
        return (loss * good).sum(), sums

    def chosen(self, batch: Batch) -> tuple[list[int], list[int]]:
        """The good samples that are compared with the reference, and those that are looked at."""
        use, good = self.constants, batch.weight > 0
        w = low_noise_weight(batch.sigma, use.shift)
        looked_at = good & (w > use.skip_below)
        if self.perceptual[0] is None:
            looked_at = torch.zeros_like(good)
        # Where a sample is looked at, c is its gate.
        compared = good & ((1 - w > use.skip_below) | looked_at)
        return compared.nonzero().flatten().tolist(), looked_at.nonzero().flatten().tolist()

    def control(
        self, batch: Batch, x0_hat: Tensor, sigma: Tensor, chosen: list[int]
    ) -> Control | None:
        """The reference's part, computed for the chosen samples alone."""
        use, count = self.constants, len(batch.x0)
        if not use.reduces_variance or not (chosen or use.same_passes):
            return None
        rows = Rows(chosen or [0], count, batch.x0.device)
        x0, sigma = rows.take(batch.x0), rows.take(sigma)
        x0_low = low_rank_image(rows.take(batch.z0), self.student.A, self.student.s)
        x0_low_hat = self.denoise_low(x0_low, batch, sigma, rows)
        if not chosen:  # run for the other ranks' sake
            return None
        x0_hat = rows.take(x0_hat)
        c = control_variate(x0, x0_hat, x0_low, x0_low_hat, floor=use.control_floor)
        return Control(rows, x0, x0_hat, x0_low, x0_low_hat, c)

    def denoise_low(self, x0_low: Tensor, batch: Batch, sigma: Tensor, rows: Rows) -> Tensor:
        """What the model as converted makes of the low-rank image under the same noise."""
        x_t = mix(x0_low, rows.take(batch.eps), sigma)
        copied, text = self.reference_copy, rows.take_text(batch.text)
        branch = as_reference(self.student.net) if copied is None else nullcontext()
        with torch.no_grad(), branch:
            u = (copied or self.student)(
                x_t, sigma, text, batch.grid, floor=self.constants.reference_floor
            )
        return clean_from_velocity(x_t, u, sigma)

    def corrected(self, x0: Tensor, control: Control, w: Tensor) -> Tensor:
        of = control
        target = corrected_target(of.x0, of.x0_low, of.x0_low_hat, of.c, of.rows.take(w))
        return of.rows.put(x0, target)

    def told(self, control: Control | None, good: Tensor) -> dict[str, Tensor]:
        """How much of the student's error the reference explains."""
        names = ("control", "num_compared", "error_energy", "error_left")
        of = control
        if of is None:
            return {name: good.new_zeros(()) for name in names}
        energy, left = error_energies(of.x0, of.x0_hat, of.x0_low, of.x0_low_hat, of.c)
        count = good.new_full((), len(of.rows))
        values = (of.c.mean(dim=(1, 2, 3)).sum(), count, energy.sum(), left.sum())
        return dict(zip(names, values, strict=True))

    def perceptual_term(
        self,
        batch: Batch,
        x0_hat: Tensor,
        w: Tensor,
        sigma: Tensor,
        control: Control | None,
        chosen: list[int],
    ) -> Tensor:
        """(B,) the perceptual term, zero for samples that are not chosen."""
        use, measure = self.constants, self.perceptual[0]
        assert measure is not None
        if not chosen:
            return torch.zeros_like(sigma)
        rows = Rows(chosen, len(batch.x0), batch.x0.device)
        gate = torch.ones_like(batch.x0[..., 0])
        if control is not None:
            gate = control.rows.put(gate, perceptual_gate(control.c))
        x0_hat, x0 = rows.take(x0_hat), rows.take(batch.x0)
        part = perceptual_loss(
            self.distance_map(measure, x0_hat, x0, batch.grid),
            rows.take(gate),
            rows.take(w),
            rows.take(sigma),
            batch.grid,
            self.student.geometry.pixel_patch,
            weight=use.perceptual_weight,
            sigma_clamp=use.sigma_clamp,
        )
        return rows.spread(part)

    def distance_map(
        self, measure: Perceptual, x0_hat: Tensor, x0: Tensor, grid: tuple[int, int]
    ) -> Tensor:
        patch, precision = self.student.geometry.pixel_patch, self.student.precision
        # Colours in float32: rounded before Oklab's matrices they are off by up to a fifth.
        made, real = (
            self.to_picture(tokens_to_image(tokens, patch, grid)) for tokens in (x0_hat, x0)
        )
        with torch.autocast(
            x0_hat.device.type, dtype=precision or torch.bfloat16, enabled=precision is not None
        ):
            return measure(made, real).float()

    def variance_sums(
        self,
        batch: Batch,
        read: list[Tensor],
        x_t: Tensor,
        x0_hat: Tensor,
        sigma: Tensor,
        target: Tensor,
        good: Tensor,
    ) -> dict[str, Tensor]:
        """Of the last map's gradients, under the target that trains and under the plain one."""
        use, sums = self.constants, dict[str, Tensor]()
        for name, aim in (("", target), ("_plain", batch.x0)):
            squares, total = gradient_sums(
                self.student,
                read,
                batch.text,
                x_t,
                x0_hat,
                sigma,
                aim,
                good,
                floor=use.student_floor,
                weight=use.weight,
                sigma_clamp=use.sigma_clamp,
            )
            sums |= {f"gradient_squares{name}": squares, f"gradient_total{name}": total}
        return sums
