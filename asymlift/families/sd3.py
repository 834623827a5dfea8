"""Stable Diffusion 3 and 3.5: diffusers SD3Transformer2DModel, which patches by itself.

B images, L text tokens, C channels, q the latent patch.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from asymlift.errors import Unavailable
from asymlift.families.autoencoder_kl import decode_latents, encode_latents, vae_sizes
from asymlift.families.base import (
    Family,
    Geometry,
    interpolated_shift,
    own_patches,
    run_map,
    setting,
)
from asymlift.families.text import apart, at_most, stack_text

CLIP_LENGTH, T5_LENGTH = 77, 256  # words that the pipeline pads a prompt to


@torch.no_grad()
def encode_prompt(
    pipeline: Any, prompts: Sequence[str], max_length: int | None = None
) -> list[dict[str, Tensor]]:
    """Embed each prompt with both CLIPs and T5; only T5's length, max_length, can be chosen."""
    if pipeline.text_encoder_3 is None:
        raise Unavailable("sd3: this checkpoint has no T5 (text_encoder_3); use one that has")
    words, _, pooled, _ = pipeline.encode_prompt(
        prompt=list(prompts),
        prompt_2=None,
        prompt_3=None,
        do_classifier_free_guidance=False,
        **at_most(max_length),
    )
    return apart(encoder_hidden_states=words, pooled_projections=pooled)


SD3 = Family(
    name="sd3",
    transformer="SD3Transformer2DModel",
    pipelines=("StableDiffusion3Pipeline",),
    first="pos_embed.proj",  # a convolution
    last="proj_out",
    final_norm="norm_out",
    order_in="c p q",  # of a convolution, so it cannot be otherwise
    order_out="p q c",
    sign=+1,
    geometry=own_patches(vae_sizes),
    channels=lambda c: {"in_channels": c, "out_channels": c},
    time=lambda tau, num_tokens: 1000 * tau,
    run=run_map,
    encode_latents=encode_latents,
    decode_latents=decode_latents,
    encode_prompt=encode_prompt,
    collate=stack_text,
    text_shapes=lambda config, length: {
        "encoder_hidden_states": (
            CLIP_LENGTH + (length or T5_LENGTH),
            setting(config, "joint_attention_dim"),
        ),
        "pooled_projections": (setting(config, "pooled_projection_dim"),),
    },
    base_shift=interpolated_shift,
    lora_targets=(
        "transformer_blocks.*.ff.net.0.proj",
        "transformer_blocks.*.ff.net.2",
        "transformer_blocks.*.ff_context.net.0.proj",
        "transformer_blocks.*.ff_context.net.2",
        "time_text_embed.timestep_embedder.linear_1",
        "time_text_embed.timestep_embedder.linear_2",
        "transformer_blocks.*.attn.to_out.0",
    ),
    checkpoints=(
        "stabilityai/stable-diffusion-3-medium-diffusers",
        "stabilityai/stable-diffusion-3.5-medium",
        "stabilityai/stable-diffusion-3.5-large",
    ),
    tier="free",
    sizes=Geometry(vae_factor=8, channels=16, patch=2),
)
