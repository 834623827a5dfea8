"""Per-sample gradients of the last map, from activations alone: what their variance is made of.

The flow loss is quadratic in the predicted image, and that is affine in what the network says. So
one forward pass tells every sample's gradient, for any target, and no weights are gathered.
"""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from asymlift.maths.asymmetric import recover_velocity
from asymlift.maths.diagnostics import last_map_gradients
from asymlift.maths.flow import clean_from_velocity
from asymlift.maths.loss import flow_loss
from asymlift.model.pixel_flow import PixelFlow


@contextmanager
def watched_last_map(flow: PixelFlow, wanted: bool) -> Iterator[list[Tensor]]:
    """Inside, what the last map reads is kept: one tensor (B, at least N, F) per forward pass."""
    seen: list[Tensor] = []
    if not wanted:
        yield seen
        return
    last = flow.net.get_submodule(flow.family.last)
    hook = last.register_forward_pre_hook(lambda module, given: seen.append(given[0].detach()))
    try:
        yield seen
    finally:
        hook.remove()


def gradient_sums(
    flow: PixelFlow,
    read: Tensor,
    x_t: Tensor,
    x0_hat: Tensor,
    sigma: Tensor,
    target: Tensor,
    good: Tensor,
    *,
    floor: float,
    weight: float,
    sigma_clamp: float,
) -> tuple[Tensor, Tensor]:
    """(sum |G|^2, sum G) of the flow loss of good samples under this target.

    Every family's last map writes the picture's tokens first and in reading order. The order of
    the numbers inside a token changes no norm, so the canonical one serves.
    """
    made = x0_hat.detach().requires_grad_()
    loss = flow_loss(made, target, sigma, weight=weight, sigma_clamp=sigma_clamp)
    (by_image,) = torch.autograd.grad(loss.sum(), made)
    said = torch.zeros_like(x_t).requires_grad_()  # affine: any point has the same derivative
    level = sigma.view(-1, 1, 1)
    u = recover_velocity(said, x_t, flow.A, flow.s, level, floor=floor)
    (by_output,) = torch.autograd.grad(clean_from_velocity(x_t, u, sigma), said, by_image)
    return last_map_gradients(read[:, : x_t.shape[1]].to(by_output.dtype), by_output, good)
