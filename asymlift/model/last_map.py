"""Per-sample gradients of the last map, from activations alone: what their variance is made of.

The flow loss is quadratic in the predicted image, and that is affine in what the network says. So
one forward pass tells every sample's gradient, for any target, and no weights are gathered.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor

from asymlift.errors import BadRecipe
from asymlift.families.base import Text
from asymlift.maths.asymmetric import recover_velocity
from asymlift.maths.diagnostics import last_map_gradients
from asymlift.maths.flow import clean_from_velocity
from asymlift.maths.loss import flow_loss
from asymlift.model.pixel_flow import PixelFlow


@contextmanager
def watched_last_map(flow: PixelFlow, wanted: bool) -> Iterator[list[Tensor]]:
    """Inside, what the last map reads is kept: a tensor (b, at least N, F) each time it is called.

    A family may run its samples one after the other; together they are the B of the batch.
    """
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


def rows_of_picture(flow: PixelFlow, read: Tensor, text: Text, num_tokens: int) -> Tensor:
    """(b, N, F) of what the last map reads: one row per token of the picture."""
    rows = flow.family.last_reads(read, text, num_tokens)
    if rows.ndim != 3 or rows.shape[1] != num_tokens:
        raise BadRecipe(
            f"finetune.variance_every: `{flow.family.last}` of {flow.family.name} reads "
            f"{tuple(read.shape)}, not one row for each of {num_tokens} tokens; set it to 0"
        )
    return rows


def gradient_sums(
    flow: PixelFlow,
    read: Sequence[Tensor],
    text: Text,
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

    The order of the numbers inside a token changes no norm, so the canonical one serves.
    """
    made = x0_hat.detach().requires_grad_()
    loss = flow_loss(made, target, sigma, weight=weight, sigma_clamp=sigma_clamp)
    (by_image,) = torch.autograd.grad(loss.sum(), made)
    said = torch.zeros_like(x_t).requires_grad_()  # affine: any point has the same derivative
    level = sigma.view(-1, 1, 1)
    u = recover_velocity(said, x_t, flow.A, flow.s, level, floor=floor)
    (by_output,) = torch.autograd.grad(clean_from_velocity(x_t, u, sigma), said, by_image)
    rows = torch.cat([rows_of_picture(flow, some, text, x_t.shape[1]) for some in read])
    return last_map_gradients(rows.to(by_output.dtype), by_output, good)
