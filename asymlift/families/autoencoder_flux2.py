"""The latents of diffusers' AutoencoderKLFlux2, whose 2 x 2 patches are normalised: FLUX.2, ERNIE.

Mean and variance of each number of a patch are running statistics of a batch norm.
"""

from typing import Any

import torch
from torch import Tensor

from asymlift.families import autoencoder_kl
from asymlift.maths.patches import Order, image_to_tokens, tokens_to_image

PATCH = 2  # latent cells, along one side
vae_sizes = autoencoder_kl.vae_sizes  # by levels of the same kind


@torch.no_grad()
def encode_latents(
    vae: Any, image: Tensor, *, eps: float | None = None, order: Order = "c p q"
) -> Tensor:
    """Turn an image in [-1, 1] into the latent that the transformer denoises."""
    z = vae.encode(image.to(vae.dtype)).latent_dist.mode()
    mean, std = _statistics(vae, eps)
    tokens = (image_to_tokens(z, PATCH, order) - mean) / std
    return tokens_to_image(tokens, PATCH, (z.shape[-2] // PATCH, z.shape[-1] // PATCH), order)


@torch.no_grad()
def decode_latents(
    vae: Any, z: Tensor, *, eps: float | None = None, order: Order = "c p q"
) -> Tensor:
    """Turn a latent of the transformer into an image in [-1, 1]."""
    mean, std = _statistics(vae, eps)
    tokens = image_to_tokens(z, PATCH, order) * std + mean
    raw = tokens_to_image(tokens, PATCH, (z.shape[-2] // PATCH, z.shape[-1] // PATCH), order)
    image: Tensor = vae.decode(raw.to(vae.dtype)).sample
    return image.clamp(-1, 1)


def _statistics(vae: Any, eps: float | None) -> tuple[Tensor, Tensor]:
    """Return mean and deviation of each number of a latent token, as the pipeline uses them."""
    variance = vae.bn.running_var.float() + (vae.config.batch_norm_eps if eps is None else eps)
    return vae.bn.running_mean.float(), variance.sqrt()
