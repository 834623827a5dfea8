"""Krea 2: diffusers Krea2Transformer2DModel, packed 2x2 latent patches.

It reads twelve layers of the text encoder, of words that all stand at the origin. What its pipeline
calls guidance_scale is one less than ours. The few-step Turbo samples on levels of its own.
B images, N = h w tokens, L text tokens (differing), K layers, C channels.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from asymlift.families.autoencoder_frames import decode_latents, encode_latents, vae_sizes
from asymlift.families.base import Config, Family, Geometry, Text, interpolated_shift, setting
from asymlift.families.packing import PATCH, grid_ids, packed, run_packed
from asymlift.families.text import at_most, padded_text, stacked, without_padding

LENGTH = 512  # words of the longest prompt
MANY_TOKENS = 6400  # of a picture that is shifted most, unless the scheduler says


def run(net: Any, latent: Tensor, time: Tensor, text: Text) -> Tensor:
    """One forward pass. latent (B, C, 2h, 2w), time (B,) -> raw output, same shape."""
    words = stacked(text, "encoder_hidden_states")
    places = grid_ids(latent)
    return run_packed(
        net,
        latent,
        timestep=time,
        position_ids=torch.cat([places.new_zeros(words.shape[1], 3), places]),
        **text,
    )


@torch.no_grad()
def encode_prompt(
    pipeline: Any, prompts: Sequence[str], max_length: int | None = None
) -> list[dict[str, Tensor]]:
    """Embed each prompt, (L, K, width), without the padding in its midst, so L differs."""
    layers, mask = pipeline.encode_prompt(prompt=list(prompts), **at_most(max_length))
    return without_padding("encoder_hidden_states", layers, mask)


def text_shapes(config: Config, length: int | None) -> dict[str, tuple[int, ...]]:
    width = setting(config, "text_hidden_dim")
    return {"encoder_hidden_states": (length or LENGTH, setting(config, "num_text_layers"), width)}


def base_shift(scheduler: Config, num_tokens: int) -> float:
    """Return the pipeline's time shift."""
    return interpolated_shift({"max_image_seq_len": MANY_TOKENS, **scheduler}, num_tokens)


KREA2 = Family(
    name="krea2",
    transformer="Krea2Transformer2DModel",
    pipelines=("Krea2Pipeline",),
    first="img_in",
    last="final_layer.linear",
    final_norm="final_layer.norm",
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
    collate=padded_text("encoder_hidden_states", "encoder_attention_mask"),
    text_shapes=text_shapes,
    base_shift=base_shift,
    lora_targets=(
        "transformer_blocks.*.ff.*",  # gate, up, down
        "transformer_blocks.*.attn.to_out.0",
        "time_embed.linear_*",
    ),
    checkpoints=("krea/Krea-2-Raw",),
    tier="free",
    heavy_text="twelve layers of the text encoder, 31 MB for 512 words",
    sizes=Geometry(vae_factor=8, channels=16, patch=2),
)
