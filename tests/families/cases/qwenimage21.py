"""Qwen-Image 2.1, tiny. Its VAE is 16 times down, as the pipeline takes for granted."""

from typing import Any

import torch
from torch import Tensor

from asymlift.families.base import Geometry, Text
from asymlift.maths.patches import image_to_tokens, tokens_to_image
from tests.families.case import (
    CHANNELS,
    LENGTH,
    WORDS,
    Case,
    Published,
    decode_frame,
    diffusers_part,
    encode_frame,
    flow_scheduler,
    straight_mu,
)
from tests.families.text_parts import talking_qwen3_vl

GRID = (4, 6)


def read(call: dict[str, Any]) -> tuple[Tensor, Tensor, Text]:
    """The answer has the words' places before the picture's."""
    tokens = call["hidden_states"][:, -GRID[0] * GRID[1] :]
    text: Text = {"encoder_hidden_states": list(call["encoder_hidden_states"])}
    return tokens_to_image(tokens, 1, GRID), call["timestep"], text


def encode_opaque(vae: Any, image: Tensor) -> Tensor:
    return encode_frame(vae, torch.cat([image, torch.ones_like(image[:, :1])], 1))


CASE = Case(
    transformer={
        "in_channels": CHANNELS,
        "out_channels": CHANNELS,
        "num_layers": 2,
        "attention_head_dim": 8,
        "num_attention_heads": 2,
        "context_in_dim": WORDS,
        "axes_dims_rope": (2, 2, 4),
    },
    vae=diffusers_part(
        "AutoencoderKLQwenImage21",
        base_dim=8,
        decoder_base_dim=8,
        z_dim=CHANNELS,
        dim_mult=[1, 1, 1, 1, 1],
        num_res_blocks=1,
        latents_mean=[0.3, -0.2, 0.1, 0.4],
        latents_std=[1.3, 0.8, 2.0, 0.7],
    ),
    scheduler=flow_scheduler(use_dynamic_shifting=True),
    text_parts=lambda: talking_qwen3_vl(WORDS, 3),
    sample=lambda noise, i: {"encoder_hidden_states": noise(LENGTH + i, WORDS)},
    read=read,
    write=lambda image: image_to_tokens(image, 1),
    start=lambda image: image_to_tokens(image, 1),
    published=(
        Published(
            "Qwen/Qwen-Image-2.1",
            {},
            {"z_dim": 64, "temperal_downsample": [False, True, True, True]},
            d=64,
            D=768,
        ),
    ),
    options={"use_kv_cache": False},
    sizes=Geometry(vae_factor=16, channels=CHANNELS, patch=1),
    grid=GRID,
    length_name="",
    length=200,  # of bytes: the template's own text comes before the prompt
    loose=frozenset({"encoder_hidden_states"}),
    raw_latent=encode_opaque,
    decoded=lambda vae, raw: decode_frame(vae, raw)[:, :3],
    vae_channels="z_dim",
    drive=lambda pipeline, call: pipeline(**call, return_dict=False)[0][:, :3],  # not opacity
    mu=straight_mu(1.15),
)
