"""The latents of diffusers' AutoencoderDC, which has no distribution, scaled: SANA."""

from typing import Any

import torch
from torch import Tensor

from asymlift.families.base import Config, setting


def vae_factor(config: Config) -> int:
    """Return f: every level but the last halves the picture."""
    return int(2 ** (len(setting(config, "encoder_block_out_channels")) - 1))


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
