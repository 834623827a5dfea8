"""Latents that are packed 2 x 2 cells a token, and position ids, as several families have them."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from asymlift.families.base import Config, Geometry, check_channels, setting
from asymlift.maths.patches import image_to_tokens, tokens_to_image

PATCH = 2  # the pipelines pack 2 x 2 latent cells into a token, whatever the config says


def packed(
    vae_sizes: Callable[[Config], tuple[int, int]], patch: int = PATCH
) -> Callable[[Config, Config], Geometry]:
    """Return what reads the sizes of a transformer that is given tokens.

    vae_sizes reads the VAE's factor and its channels, f and C.
    """

    def geometry(transformer: Config, vae: Config) -> Geometry:
        sizes = Geometry(*vae_sizes(vae), patch)
        return check_channels(sizes, setting(transformer, "in_channels") // patch**2)

    return geometry


def run_packed(net: Any, latent: Tensor, **arguments: Any) -> Tensor:
    """Call a class that reads and writes canonical tokens with a map, (B, C, 2h, 2w)."""
    tokens = image_to_tokens(latent, PATCH)
    out: Tensor = net(hidden_states=tokens, return_dict=False, **arguments)[0]
    return tokens_to_image(out, PATCH, grid_of(latent))


def grid_of(latent: Tensor, patch: int = PATCH) -> tuple[int, int]:
    """Return rows and columns of tokens."""
    return latent.shape[-2] // patch, latent.shape[-1] // patch


def grid_ids(latent: Tensor, *, patch: int = PATCH, axes: int = 3) -> Tensor:
    """Return (h w, axes): row and column of each token on axes 1 and 2, zero on the others."""
    (h, w), device = grid_of(latent, patch), latent.device
    ids = torch.zeros(h, w, axes, device=device)
    ids[..., 1] = torch.arange(h, device=device)[:, None]
    ids[..., 2] = torch.arange(w, device=device)
    return ids.view(h * w, axes)


def diagonal_ids(length: int, *, device: torch.device | None = None) -> Tensor:
    """Return (length, 3): the place of each word on axes 1 and 2, zero on axis 0."""
    place = torch.arange(length, device=device, dtype=torch.float32)
    return torch.stack([torch.zeros_like(place), place, place], dim=1)
