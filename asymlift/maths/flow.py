"""The straight path between image and noise, and what a velocity says about its ends.

B batch, N tokens, D pixel token width, d latent token width. sigma is (B,).
"""

from torch import Tensor


def mix(x0: Tensor, eps: Tensor, sigma: Tensor) -> Tensor:
    """x_t = (1 - sigma) x0 + sigma eps, for tokens (B, N, D)."""
    level = sigma.view(-1, 1, 1)
    return (1 - level) * x0 + level * eps


def clean_from_velocity(x_t: Tensor, u: Tensor, sigma: Tensor) -> Tensor:
    """x0_hat = x_t - sigma u, for tokens (B, N, D)."""
    return x_t - sigma.view(-1, 1, 1) * u


def low_rank_image(z0: Tensor, A: Tensor, s: float | Tensor) -> Tensor:
    """s A z0: what the latents (B, N, d) say in pixel tokens (B, N, D)."""
    return s * (z0 @ A.T)
