"""FLUX.1 dev and schnell: diffusers FluxTransformer2DModel, packed 2x2 latent patches.

B images, N = h w tokens, L text tokens, C channels.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from asymlift.families.autoencoder_kl import decode_latents, encode_latents, vae_sizes
from asymlift.families.base import Family, Geometry, Text, interpolated_shift, setting
from asymlift.families.packing import PATCH, grid_ids, packed, run_packed
from asymlift.families.targets import DOUBLE_BLOCKS, SINGLE_BLOCKS
from asymlift.families.text import apart, at_most, stack_text, stacked

DISTILLED_GUIDANCE = 3.5  # the pipeline's default for dev, which is told its guidance scale
LENGTH = 512  # words that the pipeline pads a prompt to


def run(net: Any, latent: Tensor, time: Tensor, text: Text) -> Tensor:
    """One forward pass. latent (B, C, 2h, 2w), time (B,) -> raw output, same shape."""
    words = stacked(text, "encoder_hidden_states")
    guidance = text.get("guidance")
    if guidance is None and net.config.guidance_embeds:
        guidance = torch.full_like(time, DISTILLED_GUIDANCE)
    return run_packed(
        net,
        latent,
        encoder_hidden_states=words,
        pooled_projections=text["pooled_projections"],
        timestep=time,
        img_ids=grid_ids(latent),
        txt_ids=torch.zeros(words.shape[1], 3, device=latent.device),
        guidance=guidance,
    )


@torch.no_grad()
def encode_prompt(
    pipeline: Any, prompts: Sequence[str], max_length: int | None = None
) -> list[dict[str, Tensor]]:
    """Embed each prompt with T5 (L, width) and CLIP's summary (width,)."""
    words, pooled, _ = pipeline.encode_prompt(
        prompt=list(prompts), prompt_2=None, **at_most(max_length)
    )
    return apart(encoder_hidden_states=words, pooled_projections=pooled)


FLUX1 = Family(
    name="flux1",
    transformer="FluxTransformer2DModel",
    pipelines=("FluxPipeline",),
    first="x_embedder",
    last="proj_out",
    final_norm="norm_out",
    order_in="c p q",
    order_out="c p q",
    sign=+1,
    geometry=packed(vae_sizes),
    channels=lambda c: {"in_channels": PATCH**2 * c, "out_channels": None},
    time=lambda tau, num_tokens: tau,  # the class multiplies by 1000
    run=run,
    encode_latents=encode_latents,
    decode_latents=decode_latents,
    encode_prompt=encode_prompt,
    collate=stack_text,
    text_shapes=lambda config, length: {
        "encoder_hidden_states": (length or LENGTH, setting(config, "joint_attention_dim")),
        "pooled_projections": (setting(config, "pooled_projection_dim"),),
    },
    base_shift=interpolated_shift,
    lora_targets=(*DOUBLE_BLOCKS, *SINGLE_BLOCKS, "time_text_embed.timestep_embedder.linear_*"),
    checkpoints=("black-forest-labs/FLUX.1-dev",),
    tier="free",
    sizes=Geometry(vae_factor=8, channels=16, patch=2),
)
