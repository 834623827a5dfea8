"""Qwen-Image 2.1: diffusers QwenImage21Transformer2DModel, a latent cell a token.

Text and picture are one sequence, in which a slot stands for four tokens of the picture, so their
number is a multiple of four. Places are counted behind the longest prompt of a batch, so samples
run one after the other, as many passes on every rank. The VAE sees opacity too: pictures are
opaque. The pipeline cuts no prompt; we do.
B images, N = h w tokens, L text tokens (differing), C channels.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from asymlift.families import autoencoder_frames
from asymlift.families.autoencoder_frames import vae_sizes
from asymlift.families.base import (
    Config,
    Family,
    Geometry,
    Grid,
    Text,
    check_grid,
    interpolated_shift,
    picture_last,
)
from asymlift.families.packing import packed
from asymlift.families.text import ragged_text, words_of
from asymlift.maths.patches import image_to_tokens, tokens_to_image

PATCH, SLOT = 1, 4  # cells of a token, along one side; tokens of a slot
LENGTH = 1024  # words of the longest prompt, ours


def why_not_grid(config: Config, grid: Grid) -> str | None:
    """Tell whether tokens are left over. Two even sides, multiples of 32 pixels, always fit."""
    if grid[0] * grid[1] % SLOT == 0:
        return None
    return f"they cannot be cut into slots of {SLOT}"


def run(net: Any, latent: Tensor, time: Tensor, text: Text) -> Tensor:
    """One forward pass per sample. latent (B, C, h, w), time (B,) -> raw output, same shape."""
    h, w = latent.shape[-2:]
    check_grid("qwenimage21", (h, w), why_not_grid(net.config, (h, w)))
    out = []
    for tokens, words, t in zip(
        image_to_tokens(latent, PATCH), text["encoder_hidden_states"], time, strict=True
    ):
        slots = torch.zeros(1, len(words) + h * w // SLOT, dtype=torch.bool, device=latent.device)
        slots[:, len(words) :] = True
        sequence = net(
            hidden_states=tokens[None],
            encoder_hidden_states=words[None],
            timestep=t[None],
            img_shapes=[[(1, h, w)]],
            img_mask=slots,
            return_dict=False,
        )[0]
        out.append(sequence[:, len(words) :])
    return tokens_to_image(torch.cat(out), PATCH, (h, w))


def encode_latents(vae: Any, image: Tensor) -> Tensor:
    """Turn an image in [-1, 1] into the latent (B, C, h, w) that the transformer denoises."""
    opaque = torch.cat([image, torch.ones_like(image[:, :1])], dim=1)
    return autoencoder_frames.encode_latents(vae, opaque)


def decode_latents(vae: Any, z: Tensor) -> Tensor:
    """Turn a latent of the transformer into an image in [-1, 1], without its opacity."""
    return autoencoder_frames.decode_latents(vae, z)[:, :3]


@torch.no_grad()
def encode_prompt(
    pipeline: Any, prompts: Sequence[str], max_length: int | None = None
) -> list[dict[str, Tensor]]:
    """Embed each prompt, (L, width). Its encoder looks back only, so the first words stand alone.

    One by one, as a batch is padded before the words.
    """
    words = [pipeline.encode_prompt(prompt=[prompt])[0][0] for prompt in prompts]
    return [{"encoder_hidden_states": one[: max_length or LENGTH].clone()} for one in words]


QWENIMAGE21 = Family(
    name="qwenimage21",
    transformer="QwenImage21Transformer2DModel",
    pipelines=("QwenImage21Pipeline",),
    first="img_in",
    last="proj_out",
    final_norm="norm_out",
    order_in="c p q",
    order_out="c p q",
    sign=+1,
    geometry=packed(vae_sizes, PATCH),
    channels=lambda c: {"in_channels": c, "out_channels": c},
    time=lambda tau, num_tokens: tau,  # the class multiplies by 1000
    run=run,
    encode_latents=encode_latents,
    decode_latents=decode_latents,
    encode_prompt=encode_prompt,
    collate=ragged_text,
    text_shapes=words_of("encoder_hidden_states", "context_in_dim", LENGTH),
    base_shift=interpolated_shift,
    lora_targets=(
        "transformer_blocks.*.img_mlp.*",  # proj, gate_layer, out
        "transformer_blocks.*.attn.to_out.0",
        "time_text_embed.timestep_embedder.linear_*",
    ),
    checkpoints=("Qwen/Qwen-Image-2.1",),
    tier="easy",
    last_reads=picture_last,
    why_not_grid=why_not_grid,
    sizes=Geometry(vae_factor=16, channels=64, patch=1),
)
