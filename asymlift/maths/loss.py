"""The finetuning loss (Chen et al., arXiv 2605.12964): a control variate, weights, two terms.

B batch, N tokens, D = 3 p^2 in canonical order, so a token is three colours of p^2 pixels.
sigma, w and the losses are (B,). Nothing here is averaged over the batch.
"""

import torch
from einops import reduce
from torch import Tensor


@torch.no_grad()
def control_variate(
    x0: Tensor, x0_hat: Tensor, x0_low: Tensor, x0_low_hat: Tensor, *, floor: float = 1e-4
) -> Tensor:
    """c (B, N, 3, 1) in [0, 1]: how much of the student's error the reference's error explains.

    One number per patch and colour; it never carries a gradient.
    """
    full = _by_color(x0 - x0_hat)
    low = _by_color(x0_low - x0_low_hat)
    energy = low.square().mean(-1, keepdim=True).clamp(min=floor)
    return ((full * low).mean(-1, keepdim=True) / energy).clamp(0, 1)


def low_noise_weight(sigma: Tensor, shift: float) -> Tensor:
    """w: 1 at no noise, 0 at pure noise; a larger `shift` (the h of the paper) falls earlier."""
    signal, noise = (1 - sigma).square(), (shift * sigma).square()
    return signal / (signal + noise)


@torch.no_grad()
def corrected_target(
    x0: Tensor, x0_low: Tensor, x0_low_hat: Tensor, c: Tensor, w: Tensor
) -> Tensor:
    """x0 less the error that the reference makes too, where noise is high: (B, N, D)."""
    shared = (1 - w).view(-1, 1, 1, 1) * c * _by_color(x0_low - x0_low_hat)
    return x0 - shared.flatten(2)


def flow_loss(
    x0_hat: Tensor, target: Tensor, sigma: Tensor, *, weight: float, sigma_clamp: float
) -> Tensor:
    """Half the squared velocity error, weight / 2 * mean((x0_hat - target)^2) / sigma^2: (B,)."""
    error = (x0_hat - target).square().mean((1, 2))
    return weight / 2 * error / sigma.clamp(min=sigma_clamp).square()


def perceptual_gate(c: Tensor) -> Tensor:
    """Root mean square of c over the colours: (B, N)."""
    return c.square().mean((2, 3)).sqrt()


def perceptual_loss(
    distance_map: Tensor,
    gate: Tensor,
    w: Tensor,
    sigma: Tensor,
    grid: tuple[int, int],
    patch: int,
    *,
    weight: float,
    sigma_clamp: float,
) -> Tensor:
    """A perceptual distance (B, 1, H, W), gated per patch and weighted towards low noise: (B,)."""
    rows, columns = grid
    # The gate is constant over a patch, so the patch's mean distance is all it needs.
    distance: Tensor = reduce(
        distance_map,
        "b 1 (rows p) (columns q) -> b (rows columns)",
        "mean",
        rows=rows,
        columns=columns,
        p=patch,
        q=patch,
    )
    return weight * w * (distance * gate).mean(1) / sigma.clamp(min=sigma_clamp).square()


def _by_color(tokens: Tensor) -> Tensor:
    """(B, N, 3 p^2) -> (B, N, 3, p^2)"""
    return tokens.reshape(*tokens.shape[:2], 3, -1)
