"""LongCat-Image: diffusers LongCatImageTransformer2DModel, packed 2x2 latent patches.

Words lie on a diagonal of positions and the picture behind their end, wherever that is; the model
attends to padding. The pipeline lets its text encoder rewrite a prompt first, unless told not to
(`enable_prompt_rewrite=False`): captions are encoded as they are written. Its guidance never makes
a token longer (`renorm`).
B images, N = h w tokens, L text tokens, C channels.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from asymlift.families.autoencoder_kl import decode_latents, encode_latents, vae_sizes
from asymlift.families.base import Family, Geometry, Text, interpolated_shift
from asymlift.families.packing import PATCH, diagonal_ids, grid_ids, packed, run_packed
from asymlift.families.targets import DOUBLE_BLOCKS, SINGLE_BLOCKS
from asymlift.families.text import apart, stack_text, stacked, tokenizer_length, words_of
from asymlift.maths.guidance import Renorm

LENGTH = 512  # words that the pipeline pads a prompt to; the picture's first position


def run(net: Any, latent: Tensor, time: Tensor, text: Text) -> Tensor:
    """One forward pass. latent (B, C, 2h, 2w), time (B,) -> raw output, same shape."""
    words = stacked(text, "encoder_hidden_states")
    corner = torch.tensor([1, LENGTH, LENGTH], device=latent.device)  # 1: a picture, not words
    return run_packed(
        net,
        latent,
        encoder_hidden_states=words,
        timestep=time,
        img_ids=corner + grid_ids(latent),
        txt_ids=diagonal_ids(words.shape[1], device=latent.device),
    )


@torch.no_grad()
def encode_prompt(
    pipeline: Any, prompts: Sequence[str], max_length: int | None = None
) -> list[dict[str, Tensor]]:
    """Embed each prompt, (L, width)."""
    with tokenizer_length(pipeline, max_length):
        words, _ = pipeline.encode_prompt(prompt=list(prompts))
    return apart(encoder_hidden_states=words)


LONGCAT = Family(
    name="longcat",
    transformer="LongCatImageTransformer2DModel",
    pipelines=("LongCatImagePipeline",),
    first="x_embedder",
    last="proj_out",
    final_norm="norm_out",
    order_in="c p q",
    order_out="c p q",
    sign=+1,
    geometry=packed(vae_sizes),
    channels=lambda c: {"in_channels": PATCH**2 * c},
    time=lambda tau, num_tokens: tau,  # the class multiplies by 1000
    run=run,
    encode_latents=encode_latents,
    decode_latents=decode_latents,
    encode_prompt=encode_prompt,
    collate=stack_text,
    text_shapes=words_of("encoder_hidden_states", "joint_attention_dim", LENGTH),
    base_shift=interpolated_shift,
    lora_targets=(*DOUBLE_BLOCKS, *SINGLE_BLOCKS, "time_embed.timestep_embedder.linear_*"),
    checkpoints=("meituan-longcat/LongCat-Image", "meituan-longcat/LongCat-Image-Dev"),
    tier="free",
    renorm=Renorm(of="tokens", only_shrinks=True),
    sizes=Geometry(vae_factor=8, channels=16, patch=2),
)
