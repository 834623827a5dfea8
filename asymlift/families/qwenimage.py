"""Qwen-Image: diffusers QwenImageTransformer2DModel, packed 2x2 latent patches.

B images, N = h w tokens, L text tokens, C channels.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from asymlift.families.autoencoder_frames import decode_latents, encode_latents, vae_factor
from asymlift.families.base import (
    Config,
    Family,
    Geometry,
    Text,
    check_channels,
    interpolated_shift,
    setting,
)
from asymlift.families.text import padded_text
from asymlift.maths.patches import image_to_tokens, tokens_to_image

PATCH = 2  # the pipelines pack 2 x 2 latent cells into a token
LENGTH = 1024  # words of the longest prompt


def geometry(transformer: Config, vae: Config) -> Geometry:
    """Read the sizes off the two configs."""
    sizes = Geometry(vae_factor(vae), setting(vae, "z_dim"), PATCH)
    return check_channels(sizes, setting(transformer, "in_channels") // PATCH**2, "qwenimage")


def run(net: Any, latent: Tensor, time: Tensor, text: Text) -> Tensor:
    """One forward pass. latent (B, C, 2h, 2w), time (B,) -> raw output, same shape."""
    h, w = latent.shape[-2] // PATCH, latent.shape[-1] // PATCH
    out: Tensor = net(
        hidden_states=image_to_tokens(latent, PATCH),
        timestep=time,
        img_shapes=[[(1, h, w)]] * len(latent),
        return_dict=False,
        **text,
    )[0]
    return tokens_to_image(out, PATCH, (h, w))


@torch.no_grad()
def encode_prompt(
    pipeline: Any, prompts: Sequence[str], max_length: int | None = None
) -> list[dict[str, Tensor]]:
    """Embed each prompt, (L, width), without padding, so L differs."""
    length = {} if max_length is None else {"max_sequence_length": max_length}
    words, mask = pipeline.encode_prompt(prompt=list(prompts), **length)
    lengths = [words.shape[1]] * len(words) if mask is None else mask.sum(dim=1).tolist()
    return [
        {"encoder_hidden_states": one[: int(n)].clone()}
        for one, n in zip(words, lengths, strict=True)
    ]


def base_shift(scheduler: Config, num_tokens: int) -> float:
    """Return the pipeline's time shift."""
    return interpolated_shift(scheduler, num_tokens, max_shift=1.15)


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
    geometry=geometry,
    channels=lambda c: {"in_channels": PATCH**2 * c, "out_channels": c},
    time=lambda tau, num_tokens: tau,  # the class multiplies by 1000
    run=run,
    encode_latents=encode_latents,
    decode_latents=decode_latents,
    encode_prompt=encode_prompt,
    collate=padded_text("encoder_hidden_states", "encoder_hidden_states_mask"),
    text_shapes=lambda config, length: {
        "encoder_hidden_states": (length or LENGTH, setting(config, "joint_attention_dim"))
    },
    base_shift=base_shift,
    lora_targets=(  # not txt_mlp: what the last block's makes is thrown away
        "transformer_blocks.*.img_mlp.net.0.proj",
        "transformer_blocks.*.img_mlp.net.2",
        "transformer_blocks.*.attn.to_out.0",
        "time_text_embed.timestep_embedder.linear_*",
    ),
    checkpoints=("Qwen/Qwen-Image", "Qwen/Qwen-Image-2512"),
    tier="free",
    sizes=Geometry(vae_factor=8, channels=16, patch=2),
)
