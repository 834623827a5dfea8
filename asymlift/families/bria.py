"""Bria 3.2: diffusers BriaTransformer2DModel, packed 2x2 latent patches.

Guidance is against no text at all: the embedding of the empty prompt is zero, as the padding is,
which the model attends to.
B images, N = h w tokens, L text tokens, C channels.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from asymlift.families.autoencoder_kl import decode_latents, encode_latents, vae_sizes
from asymlift.families.base import Family, Geometry, Text, interpolated_shift
from asymlift.families.packing import PATCH, grid_ids, packed, run_packed
from asymlift.families.targets import DOUBLE_BLOCKS, SINGLE_BLOCKS
from asymlift.families.text import at_most, dtype_without_transformer, stack_text, stacked, words_of

LENGTH = 128  # words that the pipeline pads a prompt to


def run(net: Any, latent: Tensor, time: Tensor, text: Text) -> Tensor:
    """One forward pass. latent (B, C, 2h, 2w), time (B,) -> raw output, same shape."""
    words = stacked(text, "encoder_hidden_states")
    return run_packed(
        net,
        latent,
        encoder_hidden_states=words,
        timestep=time,
        img_ids=grid_ids(latent),
        txt_ids=torch.zeros(words.shape[1], 3, device=latent.device),
    )


@torch.no_grad()
def encode_prompt(
    pipeline: Any, prompts: Sequence[str], max_length: int | None = None
) -> list[dict[str, Tensor]]:
    """Embed each prompt, (L, width), zeros behind it included."""
    with dtype_without_transformer(pipeline):
        words, _, _ = pipeline.encode_prompt(
            prompt=list(prompts), do_classifier_free_guidance=False, **at_most(max_length)
        )
    return [
        {"encoder_hidden_states": one.clone() if prompt else torch.zeros_like(one)}
        for prompt, one in zip(prompts, words, strict=True)
    ]


BRIA = Family(
    name="bria",
    transformer="BriaTransformer2DModel",
    pipelines=("BriaPipeline",),
    first="x_embedder",
    last="proj_out",
    final_norm="norm_out",
    order_in="c p q",
    order_out="c p q",
    sign=+1,
    geometry=packed(vae_sizes),
    channels=lambda c: {"in_channels": PATCH**2 * c},
    time=lambda tau, num_tokens: 1000 * tau,
    run=run,
    encode_latents=encode_latents,
    decode_latents=decode_latents,
    encode_prompt=encode_prompt,
    collate=stack_text,
    text_shapes=words_of("encoder_hidden_states", "joint_attention_dim", LENGTH),
    base_shift=interpolated_shift,
    lora_targets=(*DOUBLE_BLOCKS, *SINGLE_BLOCKS, "time_embed.timestep_embedder.linear_*"),
    checkpoints=("briaai/BRIA-3.2",),
    tier="free",
    text_needs_vae=True,
    sizes=Geometry(vae_factor=8, channels=4, patch=2),
)
