"""Stable Diffusion 3 and 3.5: diffusers SD3Transformer2DModel, which patches by itself.

B images, L text tokens, C channels, q the latent patch.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from asymlift.errors import Unavailable
from asymlift.families.autoencoder_kl import decode_latents, encode_latents
from asymlift.families.base import (
    Config,
    Family,
    Geometry,
    Text,
    check_channels,
    interpolated_shift,
    setting,
    vae_factor,
)
from asymlift.families.text import stack_text

CLIP_LENGTH, T5_LENGTH = 77, 256  # words that the pipeline pads a prompt to


def geometry(transformer: Config, vae: Config) -> Geometry:
    """Read the sizes off the two configs."""
    q = setting(transformer, "patch_size")
    sizes = Geometry(vae_factor(vae), setting(vae, "latent_channels"), q)
    return check_channels(sizes, setting(transformer, "in_channels"), "sd3")


def run(net: Any, latent: Tensor, time: Tensor, text: Text) -> Tensor:
    """One forward pass. latent (B, C, h q, w q), time (B,) -> raw output, same shape."""
    out: Tensor = net(hidden_states=latent, timestep=time, return_dict=False, **text)[0]
    return out


@torch.no_grad()
def encode_prompt(
    pipeline: Any, prompts: Sequence[str], max_length: int | None = None
) -> list[dict[str, Tensor]]:
    """Embed each prompt with both CLIPs and T5; only T5's length, max_length, can be chosen."""
    if pipeline.text_encoder_3 is None:
        raise Unavailable("sd3: this checkpoint has no T5 (text_encoder_3); use one that has")
    length = {} if max_length is None else {"max_sequence_length": max_length}
    words, _, pooled, _ = pipeline.encode_prompt(
        prompt=list(prompts),
        prompt_2=None,
        prompt_3=None,
        do_classifier_free_guidance=False,
        **length,
    )
    return [
        {"encoder_hidden_states": one.clone(), "pooled_projections": summary.clone()}
        for one, summary in zip(words, pooled, strict=True)
    ]


def base_shift(scheduler: Config, num_tokens: int) -> float:
    """Return the pipeline's time shift: a constant (3) in every published checkpoint."""
    return interpolated_shift(scheduler, num_tokens, max_shift=1.15)


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
    geometry=geometry,
    channels=lambda c: {"in_channels": c, "out_channels": c},
    time=lambda tau, num_tokens: 1000 * tau,
    run=run,
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
    base_shift=base_shift,
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
