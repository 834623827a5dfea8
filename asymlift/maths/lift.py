"""The first and the last linear map of a latent transformer, widened from latents to pixels.

n inner width, q latent patch, C latent channels, d = C q^2, D = C' q^2 pixel token width,
e extra channels. Everything is computed in the dtype given: lift in float64, then cast once.
"""

import torch
from torch import Tensor

from asymlift.maths.patches import Order, order_index


def lift_first(weight: Tensor, A: Tensor, *, patch: int, order: Order) -> Tensor:
    """W_in A^T: the map that reads pixel tokens. The bias stays as it is.

    weight is (n, d + e q^2), or a convolution's (n, C + e, q, q), which is canonical by
    definition, as is its (n, d, 1, 1) of packed patches. The e input channels after the latent
    (a mask, say) are copied.
    """
    return _read_tokens(weight, A.T, patch, order)


def unlift_first(weight: Tensor, A: Tensor, *, patch: int, order: Order) -> Tensor:
    """W_in' A: a lifted map read back in the latent basis; undoes `lift_first`."""
    return _read_tokens(weight, A, patch, order)


def lift_last(values: Tensor, A: Tensor, *, patch: int, order: Order) -> Tensor:
    """A W_out, or A b_out: the map that writes pixel tokens, from a weight or a bias.

    values is (d + e q^2, n) or (d + e q^2,). The e channels after the latent are dropped: they
    are a learned variance, which a flow model does not use.
    """
    return _write_tokens(values, A, patch, order)


def unlift_last(values: Tensor, A: Tensor, *, patch: int, order: Order) -> Tensor:
    """A^T W_out', or A^T b_out'; undoes `lift_last`, up to the dropped channels."""
    return _write_tokens(values, A.T, patch, order)


def _read_tokens(weight: Tensor, old_to_new: Tensor, patch: int, order: Order) -> Tensor:
    """Change the basis of the columns: canonical `weight @ old_to_new`, extra columns kept."""
    old, new = old_to_new.shape
    if weight.ndim == 4:
        order = "c p q"
    flat = weight.flatten(1)
    extra = flat.shape[1] - old
    columns = flat[:, _index(order, old + extra, patch)]
    columns = torch.cat([columns[:, :old] @ old_to_new, columns[:, old:]], dim=1)
    lifted = torch.empty_like(columns)
    lifted[:, _index(order, new + extra, patch)] = columns
    return lifted.view(len(weight), -1, *weight.shape[2:])


def _write_tokens(values: Tensor, old_to_new: Tensor, patch: int, order: Order) -> Tensor:
    """Change the basis of the rows: canonical `old_to_new @ values`, extra rows dropped."""
    new, old = old_to_new.shape
    rows = old_to_new @ values[_index(order, len(values), patch)[:old]]
    lifted = torch.empty_like(rows)
    lifted[_index(order, new, patch)] = rows
    return lifted


def _index(order: Order, width: int, patch: int) -> Tensor:
    return order_index(order, width // patch**2, patch)
