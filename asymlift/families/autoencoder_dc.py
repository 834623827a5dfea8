"""The latents of diffusers' AutoencoderDC, which has no distribution, scaled: SANA."""

from typing import Any

import torch
from torch import Tensor

from asymlift.families.base import Config, setting


def vae_sizes(config: Config) -> tuple[int, int]:
    """Return f and C: every level but the last halves the picture."""
    levels = len(setting(config, "encoder_block_out_channels"))
    return int(2 ** (levels - 1)), setting(config, "latent_channels")


@torch.no_grad()
def encode_latents(vae: Any, image: Tensor) -> Tensor:
    """Turn an image in [-1, 1] into the latent (B, C, h, w) that the transformer denoises."""
    z: Tensor = vae.encode(image.to(vae.dtype)).latent.float() * vae.config.scaling_factor
    return z


@torch.no_grad()
def decode_latents(vae: Any, z: Tensor) -> Tensor:
    """Turn a latent of the transformer into an image in [-1, 1]."""
    image: Tensor = vae.decode((z / vae.config.scaling_factor).to(vae.dtype)).sample
    return image.clamp(-1, 1)
