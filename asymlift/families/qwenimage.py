"""Qwen-Image: diffusers QwenImageTransformer2DModel, packed 2x2 latent patches.

The pipeline's guidance keeps tokens' length (`renorm`).
B images, N = h w tokens, L text tokens, C channels.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from asymlift.families.autoencoder_frames import decode_latents, encode_latents, vae_sizes
from asymlift.families.base import Family, Geometry, Text, interpolated_shift
from asymlift.families.packing import PATCH, grid_of, packed, run_packed
from asymlift.families.text import at_most, padded_text, words_of
from asymlift.maths.guidance import Renorm

LENGTH = 1024  # words of the longest prompt


def run(net: Any, latent: Tensor, time: Tensor, text: Text) -> Tensor:
    """One forward pass. latent (B, C, 2h, 2w), time (B,) -> raw output, same shape."""
    grid = (1, *grid_of(latent))  # one frame
    return run_packed(net, latent, timestep=time, img_shapes=[[grid]] * len(latent), **text)


@torch.no_grad()
def encode_prompt(
    pipeline: Any, prompts: Sequence[str], max_length: int | None = None
) -> list[dict[str, Tensor]]:
    """Embed each prompt, (L, width), without padding, so L differs."""
    words, mask = pipeline.encode_prompt(prompt=list(prompts), **at_most(max_length))
    lengths = [words.shape[1]] * len(words) if mask is None else mask.sum(dim=1).tolist()
    return [
        {"encoder_hidden_states": one[: int(n)].clone()}
        for one, n in zip(words, lengths, strict=True)
    ]


QWENIMAGE = Family(
    name="qwenimage",
    transformer="QwenImageTransformer2DModel",
    pipelines=("QwenImagePipeline",),
    first="img_in",
    last="proj_out",
    final_norm="norm_out",
    order_in="c p q",
    order_out="c p q",
    sign=+1,
    geometry=packed(vae_sizes),
    channels=lambda c: {"in_channels": PATCH**2 * c, "out_channels": c},
    time=lambda tau, num_tokens: tau,  # the class multiplies by 1000
    run=run,
    encode_latents=encode_latents,
    decode_latents=decode_latents,
    encode_prompt=encode_prompt,
    collate=padded_text("encoder_hidden_states", "encoder_hidden_states_mask"),
    text_shapes=words_of("encoder_hidden_states", "joint_attention_dim", LENGTH),
    base_shift=interpolated_shift,
    lora_targets=(  # not txt_mlp: what the last block's makes is thrown away
        "transformer_blocks.*.img_mlp.net.0.proj",
        "transformer_blocks.*.img_mlp.net.2",
        "transformer_blocks.*.attn.to_out.0",
        "time_text_embed.timestep_embedder.linear_*",
    ),
    checkpoints=("Qwen/Qwen-Image", "Qwen/Qwen-Image-2512"),
    tier="free",
    renorm=Renorm(of="tokens"),
    sizes=Geometry(vae_factor=8, channels=16, patch=2),
)
