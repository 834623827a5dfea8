"""What a training step tells beside its loss: explained error, loss by level, gradient variance.

B batch, N tokens, D pixel token width, F features that the last map reads. Sums, not means, so that
micro-batches and ranks can be added up.
"""

import torch
from torch import Tensor


@torch.no_grad()
def error_energies(
    x0: Tensor, x0_hat: Tensor, x0_low: Tensor, x0_low_hat: Tensor, c: Tensor
) -> tuple[Tensor, Tensor]:
    """(B,) energy of the student's error, and of what c times the reference's leaves of it."""
    full, low = x0 - x0_hat, x0_low - x0_low_hat
    shared = c * low.reshape(*c.shape[:3], -1)  # (B, N, 3, p^2)
    left = full - shared.flatten(2)
    return full.square().sum((1, 2)), left.square().sum((1, 2))


@torch.no_grad()
def sums_by_level(
    values: Tensor, weight: Tensor, sigma: Tensor, num_bins: int
) -> tuple[Tensor, Tensor]:
    """(num_bins,) sums of the values of good samples, by equal shares of sigma, and their number.

    What is not finite stays in its own bin.
    """
    bins = (sigma * num_bins).long().clamp(max=num_bins - 1)
    belongs = bins == torch.arange(num_bins, device=sigma.device).unsqueeze(1)  # (num_bins, B)
    belongs &= weight > 0
    return torch.where(belongs, values, 0).sum(1), belongs.to(values.dtype).sum(1)


@torch.no_grad()
def last_map_gradients(h: Tensor, g: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    """Of each sample's gradient of a linear map G = g^T h: sum |G|^2 (), and sum G (D, F).

    h (B, N, F) is what the map reads, g (B, N, D) the gradient of each sample's own loss with
    respect to what it writes. One gradient is held at a time.
    """
    squares, total = h.new_zeros(()), h.new_zeros(g.shape[2], h.shape[2])
    for number in range(len(h)):
        G = weight[number] * (g[number].T @ h[number])
        squares += G.square().sum()
        total += G
    return squares, total


def covariance_trace(squares: float, square_of_sum: float, count: int) -> float:
    """The summed variance of all entries of G over `count` samples, unbiased."""
    return (squares - square_of_sum / count) / (count - 1)
