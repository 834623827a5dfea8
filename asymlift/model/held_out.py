"""The losses of samples that are not trained on: against the true image, without its reference.

B samples of N tokens of width D, grid (h, w).
"""

import torch
from torch import Tensor

from asymlift.families.base import Text
from asymlift.maths.flow import clean_from_velocity, mix
from asymlift.maths.loss import flow_loss, low_noise_weight, perceptual_loss
from asymlift.model.training_step import TrainingStep

FLOW, PERCEPTUAL = "flow", "perceptual"


@torch.no_grad()
def held_out_losses(
    step: TrainingStep,
    x0: Tensor,
    eps: Tensor,
    sigma: Tensor,
    text: Text,
    grid: tuple[int, int],
) -> dict[str, Tensor]:
    """(B,) of each term that the model is trained with; the clamps are the training's.

    Unweighted, so that a curve goes on where a recipe changes its weights. The control variate
    changes with the student, so what it takes off would hide what is learnt.
    """
    use, student, measure = step.constants, step.student, step.perceptual[0]
    with torch.autocast(x0.device.type, enabled=False):
        x_t = mix(x0, eps, sigma)
        u = student(x_t, sigma, text, grid, floor=use.student_floor)
        x0_hat = clean_from_velocity(x_t, u, sigma)
        flow = flow_loss(x0_hat, x0, sigma, weight=1.0, sigma_clamp=use.sigma_clamp)
        if measure is None:
            return {FLOW: flow}
        perceptual = perceptual_loss(
            step.distance_map(measure, x0_hat, x0, grid),
            torch.ones_like(x0[..., 0]),
            low_noise_weight(sigma, use.shift),
            sigma,
            grid,
            student.geometry.pixel_patch,
            weight=1.0,
            sigma_clamp=use.sigma_clamp,
        )
        return {FLOW: flow, PERCEPTUAL: perceptual}
