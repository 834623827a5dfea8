"""Images and their tokens. B batch, c channels, p patch, (h, w) the token grid, N = h * w."""

from typing import Literal

import torch
from einops import rearrange
from torch import Tensor

# How one patch becomes one vector: channel, row, column (ours, canonical), or channel last.
Order = Literal["c p q", "p q c"]


def image_to_tokens(image: Tensor, patch: int, order: Order = "c p q") -> Tensor:
    """(B, c, h p, w p) -> (B, h w, c p p), the grid read row by row."""
    tokens: Tensor = rearrange(image, f"b c (h p) (w q) -> b (h w) ({order})", p=patch, q=patch)
    return tokens


def tokens_to_image(
    tokens: Tensor, patch: int, grid: tuple[int, int], order: Order = "c p q"
) -> Tensor:
    """(B, h w, c p p) -> (B, c, h p, w p). The number of channels follows from the width.

    With the latent's own patch this re-reads a pixel token as a latent one with more channels.
    """
    h, w = grid
    image: Tensor = rearrange(
        tokens, f"b (h w) ({order}) -> b c (h p) (w q)", h=h, w=w, p=patch, q=patch
    )
    return image


def order_index(order: Order, channels: int, patch: int) -> Tensor:
    """Index with canonical[k] = model_vector[index[k]], for a model that flattens in `order`."""
    index: Tensor = rearrange(
        torch.arange(channels * patch**2), f"({order}) -> (c p q)", c=channels, p=patch, q=patch
    )
    return index
