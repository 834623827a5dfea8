"""The latents of video VAEs that read a picture as one frame: Qwen-Image, Wan.

They are normalised by a mean and a deviation of each channel, which stand in the config.
"""

from typing import Any

import torch
from torch import Tensor

from asymlift.families.base import Config, setting


def vae_sizes(config: Config) -> tuple[int, int]:
    """Return f and C: every level but the last halves the picture.

    Wan 2.2 cuts it into patches first.
    """
    halved = int(2 ** len(setting(config, "temperal_downsample")))
    return halved * (config.get("patch_size") or 1), setting(config, "z_dim")


@torch.no_grad()
def encode_latents(vae: Any, image: Tensor) -> Tensor:
    """Turn an image in [-1, 1] into the latent (B, C, h, w) that the transformer denoises."""
    frame = image.to(vae.dtype).unsqueeze(2)  # (B, 3, 1, H, W)
    raw = vae.encode(frame).latent_dist.mode().squeeze(2).float()
    mean, std = _statistics(vae, raw)
    z: Tensor = (raw - mean) / std
    return z


@torch.no_grad()
def decode_latents(vae: Any, z: Tensor) -> Tensor:
    """Turn a latent of the transformer into an image in [-1, 1]."""
    mean, std = _statistics(vae, z)
    raw = (z * std + mean).to(vae.dtype).unsqueeze(2)
    image: Tensor = vae.decode(raw).sample.squeeze(2)
    return image.clamp(-1, 1)


def _statistics(vae: Any, like: Tensor) -> tuple[Tensor, Tensor]:
    mean, std = (
        torch.tensor(values, dtype=like.dtype, device=like.device).view(1, -1, 1, 1)
        for values in (vae.config.latents_mean, vae.config.latents_std)
    )
    return mean, std
