"""Latents that are packed 2 x 2 cells a token, and position ids, as several families have them."""

from collections.abc import Callable

import torch
from torch import Tensor

from asymlift.families.base import Config, Geometry, check_channels, setting, vae_factor

PATCH = 2  # the pipelines pack 2 x 2 latent cells into a token, whatever the config says


def packed_geometry(family: str) -> Callable[[Config, Config], Geometry]:
    """Return what reads the sizes off the two configs of a family with an AutoencoderKL."""

    def geometry(transformer: Config, vae: Config) -> Geometry:
        sizes = Geometry(vae_factor(vae), setting(vae, "latent_channels"), PATCH)
        return check_channels(sizes, setting(transformer, "in_channels") // PATCH**2, family)

    return geometry


def grid_ids(h: int, w: int, *, axes: int = 3, device: torch.device | None = None) -> Tensor:
    """Return (h w, axes): row and column of each token on axes 1 and 2, zero on the others."""
    rows, columns = torch.meshgrid(
        torch.arange(h, device=device), torch.arange(w, device=device), indexing="ij"
    )
    ids = torch.zeros(h, w, axes, device=device)
    ids[..., 1], ids[..., 2] = rows, columns
    return ids.view(h * w, axes)


def diagonal_ids(length: int, *, device: torch.device | None = None) -> Tensor:
    """Return (length, 3): the place of each word on axes 1 and 2, zero on axis 0."""
    place = torch.arange(length, device=device, dtype=torch.float32)
    return torch.stack([torch.zeros_like(place), place, place], dim=1)
