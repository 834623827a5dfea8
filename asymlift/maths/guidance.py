"""Guidance without oversaturation, and predictions kept inside the range of pictures.

Everything is (B, ...) in the model's colour space.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from asymlift.maths.patches import image_to_tokens, tokens_to_image


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


@dataclass(frozen=True)
class Renorm:
    """Whose length guidance leaves as the positive branch has it; pipelines differ."""

    of: Literal["tokens", "pictures", "rows"]  # rows: of each channel of the latent map
    only_shrinks: bool = False  # what guidance has shortened stays short


def renormalised_guidance(
    v_pos: Tensor,
    v_neg: Tensor,
    *,
    scale: float,
    renorm: Renorm,
    patch: int,
    grid: tuple[int, int],
    A: Tensor | None = None,
) -> Tensor:
    """Classifier-free guidance whose tokens, pictures or rows keep the positive branch's length.

    v_pos and v_neg are (B, N, width) as the network says them, tokens of patch x patch cells. In
    pixels, with the basis A, that is u_a, whose tokens and pictures are as long as the latent ones
    (velocities are longer by their part outside the subspace). Rows of a latent map lie across the
    basis: there the part inside it is renormalised, and the rest is guided as it is.
    """
    guided = v_neg + scale * (v_pos - v_neg)
    if renorm.of != "rows":
        dims = (-1,) if renorm.of == "tokens" else (-2, -1)
        long_pos, long = (v.norm(dim=dims, keepdim=True) for v in (v_pos, guided))
        return guided * _ratio(long_pos, long, renorm)
    low_pos, low = (v if A is None else v @ A for v in (v_pos, guided))
    row_pos, row = (_row_lengths(v, patch, grid) for v in (low_pos, low))
    change = low * (_ratio(row_pos, row, renorm) - 1)
    return guided + (change if A is None else change @ A.T)


def _ratio(wanted: Tensor, length: Tensor, renorm: Renorm) -> Tensor:
    ratio = wanted / length.clamp(min=torch.finfo(length.dtype).tiny)
    return ratio.clamp(max=1) if renorm.only_shrinks else ratio


def _row_lengths(tokens: Tensor, patch: int, grid: tuple[int, int]) -> Tensor:
    """Of each number of the tokens (B, N, d), the length of the row of the map that it lies in."""
    image = tokens_to_image(tokens, patch, grid)
    return image_to_tokens(image.norm(dim=-1, keepdim=True).expand_as(image), patch)


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
