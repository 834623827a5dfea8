"""The latents of diffusers' AutoencoderKL, shifted and scaled: SD3, Z-Image.

Some pipelines scale only, whatever shift the VAE's config has: AuraFlow, CogView4, Kandinsky 5.
"""

from typing import Any

import torch
from torch import Tensor

from asymlift.families.base import Config, setting


def vae_sizes(config: Config) -> tuple[int, int]:
    """Return f and C: every level but the last halves the picture."""
    levels = len(setting(config, "block_out_channels"))
    return int(2 ** (levels - 1)), setting(config, "latent_channels")


@torch.no_grad()
def encode_latents(vae: Any, image: Tensor) -> Tensor:
    """Turn an image in [-1, 1] into the latent (B, C, h, w) that the transformer denoises."""
    raw = vae.encode(image.to(vae.dtype)).latent_dist.mode().float()
    z: Tensor = (raw - _shift(vae)) * vae.config.scaling_factor
    return z


@torch.no_grad()
def decode_latents(vae: Any, z: Tensor) -> Tensor:
    """Turn a latent of the transformer into an image in [-1, 1]."""
    raw = z / vae.config.scaling_factor + _shift(vae)
    image: Tensor = vae.decode(raw.to(vae.dtype)).sample
    return image.clamp(-1, 1)


@torch.no_grad()
def encode_scaled(vae: Any, image: Tensor) -> Tensor:
    """Likewise, without the shift."""
    raw = vae.encode(image.to(vae.dtype)).latent_dist.mode().float()
    z: Tensor = raw * vae.config.scaling_factor
    return z


@torch.no_grad()
def decode_scaled(vae: Any, z: Tensor) -> Tensor:
    """Likewise, without the shift."""
    image: Tensor = vae.decode((z / vae.config.scaling_factor).to(vae.dtype)).sample
    return image.clamp(-1, 1)


def _shift(vae: Any) -> float:
    return float(vae.config.shift_factor or 0.0)
