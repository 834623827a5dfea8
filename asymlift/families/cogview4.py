"""CogView4: diffusers CogView4Transformer2DModel, which patches by itself.

It is told the time before the scheduler's shift, so its time depends on the number of tokens. Its
attention mask hides nothing (the class adds it to the scores), so prompts of unlike lengths cannot
share a pass: samples run one after the other, as many passes on every rank.
B images, L text tokens (a multiple of 16), C channels, q the latent patch.
"""

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from asymlift.errors import BadData
from asymlift.families.autoencoder_kl import decode_scaled, encode_scaled, vae_sizes
from asymlift.families.base import (
    Config,
    Family,
    Geometry,
    Text,
    own_patches,
    plain_shift,
    setting,
    shift_from_mu,
)
from asymlift.families.text import at_most, ragged_text

VAE_FACTOR = 8  # the model is told the picture's size in pixels
LENGTH, MULTIPLE = 1024, 16  # words of the longest prompt; the pipeline pads to a multiple


def geometry(transformer: Config, vae: Config) -> Geometry:
    """Read the sizes off the two configs."""
    factor, _ = vae_sizes(vae)
    if factor != VAE_FACTOR:
        raise BadData(f"cogview4: the VAE scales down by {factor}, not {VAE_FACTOR}")
    return own_patches(vae_sizes)(transformer, vae)


def pipeline_mu(config: Config, num_tokens: int) -> float:
    """Return the mu of the pipeline, whose own defaults are those of the published scheduler."""
    slope, offset = config.get("max_shift", 0.75), config.get("base_shift", 0.25)
    few = config.get("base_image_seq_len", 256)
    return float(slope * math.sqrt(num_tokens / few) + offset)


def unshifted_time(tau: Tensor, num_tokens: int) -> Tensor:
    """Return what the network is told: tau = shift t / (1 + (shift - 1) t), solved for 1000 t."""
    shift = pipeline_mu({}, num_tokens)
    return 1000 * tau / (tau + shift * (1 - tau))


def run(net: Any, latent: Tensor, time: Tensor, text: Text) -> Tensor:
    """One forward pass per sample. latent (B, C, h q, w q), time (B,) -> raw output, same shape."""
    size = torch.tensor([[VAE_FACTOR * n for n in latent.shape[-2:]]], device=latent.device).float()
    out = [
        net(
            hidden_states=one[None],
            encoder_hidden_states=words[None],
            timestep=t[None],
            original_size=size,
            target_size=size,
            crop_coords=torch.zeros_like(size),
            return_dict=False,
        )[0]
        for one, words, t in zip(latent, text["encoder_hidden_states"], time, strict=True)
    ]
    return torch.cat(out)


@torch.no_grad()
def encode_prompt(
    pipeline: Any, prompts: Sequence[str], max_length: int | None = None
) -> list[dict[str, Tensor]]:
    """Embed each prompt, (L, width), alone: in a batch it would depend on the longest."""
    return [
        {
            "encoder_hidden_states": pipeline.encode_prompt(
                prompt=[prompt], do_classifier_free_guidance=False, **at_most(max_length)
            )[0][0].clone()
        }
        for prompt in prompts
    ]


def base_shift(scheduler: Config, num_tokens: int) -> float:
    """Return the pipeline's time shift."""
    if not scheduler.get("use_dynamic_shifting", False):
        return plain_shift(scheduler, num_tokens)
    return shift_from_mu(scheduler, pipeline_mu(scheduler, num_tokens))


COGVIEW4 = Family(
    name="cogview4",
    transformer="CogView4Transformer2DModel",
    pipelines=("CogView4Pipeline",),
    first="patch_embed.proj",
    last="proj_out",
    final_norm="norm_out",
    order_in="c p q",
    order_out="c p q",
    sign=+1,
    geometry=geometry,
    channels=lambda c: {"in_channels": c, "out_channels": c},
    time=unshifted_time,
    run=run,
    encode_latents=encode_scaled,
    decode_latents=decode_scaled,
    encode_prompt=encode_prompt,
    collate=ragged_text,
    text_shapes=lambda config, length: {
        "encoder_hidden_states": (
            math.ceil((length or LENGTH) / MULTIPLE) * MULTIPLE,
            setting(config, "text_embed_dim"),
        )
    },
    base_shift=base_shift,
    lora_targets=(
        "transformer_blocks.*.ff.net.0.proj",
        "transformer_blocks.*.ff.net.2",
        "transformer_blocks.*.attn1.to_out.0",
        "time_condition_embed.timestep_embedder.linear_*",
    ),
    checkpoints=("zai-org/CogView4-6B",),
    sizes=Geometry(vae_factor=8, channels=16, patch=2),
    tier="easy",
)
