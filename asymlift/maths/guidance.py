"""Guidance without oversaturation, and predictions kept inside the range of pictures.

Everything is (B, ...) in the model's colour space.
"""

from collections.abc import Callable

from torch import Tensor


def guide(
    u_pos: Tensor,
    u_neg: Tensor,
    x0_pos: Tensor,
    *,
    scale: float,
    orthogonal: float,
    floor: float = 1e-6,
) -> Tensor:
    """Classifier-free guidance of strength `scale`, less a share of its push along the image.

    x0_pos is the clean image that u_pos predicts. Of the correction's component along it, the
    share `orthogonal` is removed: that component only makes the image louder.
    """
    correction = (u_pos - u_neg) * (scale - 1)
    all_but_batch = tuple(range(1, x0_pos.ndim))
    energy = x0_pos.square().mean(all_but_batch, keepdim=True).clamp(min=floor)
    along = (correction * x0_pos).mean(all_but_batch, keepdim=True) / energy
    return u_pos + correction - orthogonal * along * x0_pos


def renormalised_guidance(v_pos: Tensor, v_neg: Tensor, *, scale: float) -> Tensor:
    """Classifier-free guidance whose every token is as long as the positive branch's.

    Both are (B, N, width) as the network says them. In pixels that is u_a, where a lifted model's
    tokens are as long as the latent ones; velocities are longer by their part outside the subspace.
    """
    guided = v_neg + scale * (v_pos - v_neg)
    longer: Tensor = guided.norm(dim=-1, keepdim=True) / v_pos.norm(dim=-1, keepdim=True)
    return guided / longer


def clamp_denoised(
    u: Tensor,
    x_t: Tensor,
    sigma: Tensor,
    *,
    decode: Callable[[Tensor], Tensor],
    encode: Callable[[Tensor], Tensor],
    floor: float,
) -> Tensor:
    """The velocity towards the predicted image with its colours clamped to [-1, 1] RGB.

    decode and encode are those of a `ColorCode`. It comes after guidance, which leaves the range.
    """
    x0_hat = encode(decode(x_t - sigma * u).clamp(-1, 1))
    return (x_t - x0_hat) / sigma.clamp(min=floor)
