"""From noise to pictures, in pixels or in latents.

B pictures, N tokens of D numbers in pixels and d in latents. sigma is the pixel noise level and
tau the latent one; a grid runs from (almost) 1 to exactly 0, in float64.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Literal, Protocol

import torch
from torch import Tensor

from asymlift.data.order import generator
from asymlift.errors import BadData, BadRecipe
from asymlift.families.base import Family, Geometry, Text, renorm_rule
from asymlift.maths.color import ColorCode
from asymlift.maths.guidance import clamp_denoised, guide, renormalised_guidance
from asymlift.maths.patches import image_to_tokens, tokens_to_image
from asymlift.maths.schedule import pixel_shift, shift_for_pixels, sigma_grid
from asymlift.maths.solver import OnStep, Velocity, euler, heun
from asymlift.runtime import third_party

Shift = Literal["sqrt_pixels", "base"] | float

# UniPC reckons in log((1 - sigma) / sigma), which has no value at 1. As in diffusers.
ALMOST_ONE = 1 - 1e-6


@dataclass(frozen=True)
class SampleSettings:
    """How pictures are made. The defaults are those published for lifted models."""

    solver: Literal["euler", "heun", "unipc"] = "unipc"
    steps: int = 38
    guidance: float = 4.0  # 1 is none, and saves the second forward pass
    orthogonal: float = 1.0  # share of the guidance along the predicted image that is removed
    renorm: bool = False  # instead, the network's answer keeps its length, as the family has it
    clamp: bool = True  # predicted images are clamped to the range of pictures, pixels only
    shift: Shift = "sqrt_pixels"
    floor: float = 1e-4  # no division by a noise level below this


class PixelVelocity(Protocol):
    """What is asked of a `PixelFlow`."""

    family: Family
    geometry: Geometry
    A: Tensor

    def __call__(
        self, x_t: Tensor, sigma: Tensor, text: Text, grid: tuple[int, int], *, floor: float
    ) -> Tensor: ...

    def predict(self, x_t: Tensor, sigma: Tensor, text: Text, grid: tuple[int, int]) -> Tensor: ...

    def recover(self, u_a: Tensor, x_t: Tensor, sigma: Tensor, *, floor: float) -> Tensor: ...


class LatentVelocity(Protocol):
    """What is asked of a `LatentFlow`."""

    family: Family
    geometry: Geometry

    def __call__(self, z_t: Tensor, tau: Tensor, text: Text, grid: tuple[int, int]) -> Tensor: ...


def noise_levels(
    settings: SampleSettings, *, height: int, width: int, s: float, base_shift: float
) -> Tensor:
    """The (steps + 1,) pixel noise levels, refused if the last one above 0 is below the floor.

    `tau_from_sigma` of them is the grid on which the latent model takes the same steps; with
    shift `base` that is the grid on which the base itself samples.
    """
    match settings.shift:
        case "sqrt_pixels":
            shift = shift_for_pixels(height, width)
        case "base":
            shift = pixel_shift(base_shift, s)
        case number:
            shift = number
    sigmas = sigma_grid(settings.steps, shift)
    last = sigmas[-2].item()
    if last < settings.floor:
        # last = shift / (shift + steps - 1)
        most = int(shift * (1 / settings.floor - 1)) + 1
        raise BadRecipe(
            f"{settings.steps} steps at shift {shift:.4g} end on noise level {last:.1e}, below the "
            f"floor {settings.floor:g}: noise would be left in the picture.\n"
            f"Use at most {most} steps, a larger shift, or a lower floor."
        )
    if settings.solver == "unipc":
        sigmas[0] = ALMOST_ONE
    return sigmas


def noise_for(seed: int, index: int, shape: Sequence[int]) -> Tensor:
    """Unit noise that depends on nothing but its arguments: no batch, no rank, no device."""
    return torch.randn(*shape, generator=generator(seed, "sample noise", index))


def pixel_noise(seed: int, indices: Sequence[int], height: int, width: int, patch: int) -> Tensor:
    """The tokens of one noise picture per index, (B, N, D), on the CPU."""
    pictures = torch.stack([noise_for(seed, index, (3, height, width)) for index in indices])
    return image_to_tokens(pictures, patch)


def latent_noise(eps: Tensor, A: Tensor) -> Tensor:
    """The noise that a latent model sees in pixel noise: A^T eps, unit as A is orthonormal."""
    return eps @ A.to(eps)


def sample_pixels(
    flow: PixelVelocity,
    eps: Tensor,
    text: Text,
    null_text: Text | None,
    sigmas: Tensor,
    settings: SampleSettings,
    color: ColorCode,
    grid: tuple[int, int],
    on_step: OnStep | None = None,
    against: PixelVelocity | None = None,
) -> Tensor:
    """Pictures in [-1, 1] from noise tokens eps (B, N, D).

    null_text is for guidance only, and `against` what answers to it, if not `flow` itself.
    """
    tokens = solve_pixels(
        flow, eps, text, null_text, sigmas, settings, color, grid, on_step, against
    )
    image = tokens_to_image(tokens, flow.geometry.pixel_patch, grid)
    return color.decode(image).clamp(-1, 1)


@torch.no_grad()
def solve_pixels(
    flow: PixelVelocity,
    eps: Tensor,
    text: Text,
    null_text: Text | None,
    sigmas: Tensor,
    settings: SampleSettings,
    color: ColorCode,
    grid: tuple[int, int],
    on_step: OnStep | None = None,
    against: PixelVelocity | None = None,
) -> Tensor:
    """The same, but the tokens as the model leaves them, in its own colour space."""
    patch = flow.geometry.pixel_patch

    def predict(net: PixelVelocity, x_t: Tensor, sigma: Tensor, condition: Text) -> Tensor:
        levels = sigma.to(x_t).expand(len(x_t))
        if settings.renorm:
            return net.predict(x_t, levels, condition, grid).to(x_t)
        return net(x_t, levels, condition, grid, floor=settings.floor).to(x_t)

    both = partial(predict, flow), partial(predict, against or flow)

    renormalise = _renormalisation(flow, settings, grid, flow.A.to(eps))

    def velocity(x_t: Tensor, sigma: Tensor) -> Tensor:
        u = _guided(both, x_t, sigma, text, null_text, settings, renormalise)
        if settings.renorm:  # what was guided is u_a
            levels = sigma.to(x_t).expand(len(x_t))
            u = flow.recover(u, x_t, levels, floor=settings.floor).to(x_t)
        if not settings.clamp:
            return u
        return clamp_denoised(
            u,
            x_t,
            sigma,
            decode=lambda tokens: color.decode(tokens_to_image(tokens, patch, grid)),
            encode=lambda image: image_to_tokens(color.encode(image), patch),
            floor=settings.floor,
        )

    return SOLVERS[settings.solver](velocity, eps, sigmas, on_step)


@torch.no_grad()
def sample_latents(
    flow: LatentVelocity,
    noise: Tensor,
    text: Text,
    null_text: Text | None,
    taus: Tensor,
    settings: SampleSettings,
    grid: tuple[int, int],
    on_step: OnStep | None = None,
    against: LatentVelocity | None = None,
) -> Tensor:
    """Clean latent tokens (B, N, d). Latents have no colours, so nothing is clamped."""

    def predict(net: LatentVelocity, z_t: Tensor, tau: Tensor, condition: Text) -> Tensor:
        return net(z_t, tau.to(z_t).expand(len(z_t)), condition, grid).to(z_t)

    both = partial(predict, flow), partial(predict, against or flow)

    renormalise = _renormalisation(flow, settings, grid)

    def velocity(z_t: Tensor, tau: Tensor) -> Tensor:
        return _guided(both, z_t, tau, text, null_text, settings, renormalise)

    return SOLVERS[settings.solver](velocity, noise, taus, on_step)


Predict = Callable[[Tensor, Tensor, Text], Tensor]
Renormalise = Callable[[Tensor, Tensor], Tensor]  # (positive, negative) -> guided


def _renormalisation(
    flow: PixelVelocity | LatentVelocity,
    settings: SampleSettings,
    grid: tuple[int, int],
    A: Tensor | None = None,
) -> Renormalise | None:
    """The family's own renormalisation of guidance, if it is wanted; A where tokens are pixels."""
    if not settings.renorm:
        return None
    return partial(
        renormalised_guidance,
        scale=settings.guidance,
        renorm=renorm_rule(flow.family),
        patch=flow.geometry.patch,
        grid=grid,
        A=A,
    )


def _guided(
    both: tuple[Predict, Predict],  # for the text, and against it
    x_t: Tensor,
    sigma: Tensor,
    text: Text,
    null_text: Text | None,
    settings: SampleSettings,
    renormalise: Renormalise | None,
) -> Tensor:
    predict, predict_against = both
    u = predict(x_t, sigma, text)
    if settings.guidance != 1:
        assert null_text is not None, "guidance needs the empty prompt"
        u_neg = predict_against(x_t, sigma, null_text)
        if renormalise:
            u = renormalise(u, u_neg)
        else:
            x0_pos = x_t - sigma * u
            u = guide(u, u_neg, x0_pos, scale=settings.guidance, orthogonal=settings.orthogonal)
    if not u.isfinite().all():  # here, because clamping colours would hide it
        raise BadData(
            f"the network answers with NaN or infinity at noise level {sigma:.3f}. Its weights are "
            "broken (`asymlift verify`), or numbers overflow in bfloat16 (try float32)."
        )
    return u


def unipc(velocity: Velocity, x: Tensor, sigmas: Tensor, on_step: OnStep | None = None) -> Tensor:
    """UniPC of order 2 (Zhao et al. 2023), by diffusers on exactly this grid.

    One evaluation a step. It commutes with the lift where the latent grid is the mapped one, and
    ends with an Euler step, so the last image it predicts is the result.
    """
    levels = sigmas.clone()
    if levels[0] == 1:
        levels[0] = ALMOST_ONE
    scheduler = third_party.library("diffusers").UniPCMultistepScheduler(
        solver_order=2, prediction_type="flow_prediction", use_flow_sigmas=True
    )
    scheduler.set_timesteps(sigmas=levels[:-1].cpu().numpy().copy())
    scheduler.set_begin_index(0)  # it would look up its timesteps, which are rounded and repeat
    scheduler.sigmas = levels  # its own are float32, where 1 - sigma has 4 bits left at the start
    for step, (sigma, timestep) in enumerate(
        zip(levels[:-1], scheduler.timesteps, strict=True), start=1
    ):
        x = scheduler.step(velocity(x, sigma), timestep, x, return_dict=False)[0]
        if on_step:
            on_step(step, x)
    return x


Solver = Callable[[Velocity, Tensor, Tensor, OnStep | None], Tensor]
SOLVERS: dict[str, Solver] = {"euler": euler, "heun": heun, "unipc": unipc}
