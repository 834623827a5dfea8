"""The rank-asymmetric velocity (Chen et al., arXiv 2605.12964), and the full one from it.

B batch, N tokens, D pixel token width, d rank. sigma is (B, 1, 1), or anything that broadcasts.
"""

from torch import Tensor


def project(x: Tensor, A: Tensor) -> Tensor:
    """P x, the part of x inside the subspace. P itself is never built."""
    return (x @ A) @ A.T


def calibrate(sigma: Tensor, s: float | Tensor) -> tuple[Tensor, Tensor]:
    """Return (k, tau): the gain on the input and the noise level the network is told.

    Chosen so that, inside the subspace, k * x_t is exactly (1 - tau) * z0 + tau * noise.
    """
    k = 1 / (sigma + s * (1 - sigma))  # in this order sigma = 1 gives k = tau = 1 to the last bit
    return k, k * sigma


def clean_input(x_ref: Tensor, s: float | Tensor) -> Tensor:
    """x_ref / s, what the network reads of a picture without noise: k at sigma = 0, at any tau."""
    return x_ref / s


def asymmetric_target(x0: Tensor, eps: Tensor, A: Tensor, s: float | Tensor) -> Tensor:
    """u_a = P eps - x0 / s: all of the image, but only the noise inside the subspace."""
    return project(eps, A) - x0 / s


def recover_velocity(
    u_a: Tensor, x_t: Tensor, A: Tensor, s: float | Tensor, sigma: Tensor, *, floor: float
) -> Tensor:
    """Turn the network output u_a = P eps - x0 / s into u = eps - x0."""
    k, _ = calibrate(sigma, s)
    noise = x_t + s * u_a  # sigma * eps outside the subspace: there u_a is only the image
    outside = noise / sigma.clamp(min=floor)
    inside = k * (noise - s * x_t)  # k (s u_a + (1 - s) x_t): sigma cancels, no division here
    return outside + project(inside - outside, A)
