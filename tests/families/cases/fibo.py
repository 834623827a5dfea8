"""Bria FIBO, tiny."""

from typing import Any

import torch
from torch import Tensor

from asymlift.families.base import Geometry, Text
from asymlift.maths.patches import image_to_tokens, tokens_to_image
from tests.families.case import (
    CHANNELS,
    LENGTH,
    Case,
    Published,
    decode_frame,
    diffusers_part,
    encode_frame,
    flow_scheduler,
    straight_mu,
)
from tests.families.text_parts import byte_tokenizer, smollm3

GRID = (4, 6)
WIDTH, LAYERS = 12, 3  # of the text encoder; there are four blocks


def read(call: dict[str, Any]) -> tuple[Tensor, Tensor, Text]:
    layers = torch.stack(call["text_encoder_layers"][:LAYERS], dim=2)
    mask = call["joint_attention_kwargs"].get("attention_mask")
    words = layers.shape[1]
    text: Text = {
        "text_layers": layers,
        "text_mask": layers.new_ones(1, words).bool() if mask is None else mask[:, 0, 0, :words],
    }
    return tokens_to_image(call["hidden_states"], 1, GRID), call["timestep"], text


def as_cells(image: Tensor) -> Tensor:
    return image_to_tokens(image, 1)


CASE = Case(
    transformer={
        "in_channels": CHANNELS,
        "num_layers": 2,
        "num_single_layers": 2,
        "attention_head_dim": 16,
        "num_attention_heads": 2,
        "joint_attention_dim": 2 * WIDTH,
        "text_encoder_dim": WIDTH,
        "axes_dims_rope": (4, 6, 6),
    },
    vae=diffusers_part(
        "AutoencoderKLWan",
        base_dim=8,
        z_dim=CHANNELS,
        dim_mult=[1, 1, 1, 1],
        num_res_blocks=1,
        temperal_downsample=[False, True, True],
        is_residual=True,
        in_channels=12,
        out_channels=12,
        patch_size=2,
        latents_mean=[0.3, -0.2, 0.1, 0.4],
        latents_std=[1.3, 0.8, 2.0, 0.7],
    ),
    scheduler=flow_scheduler(use_dynamic_shifting=True),
    text_parts=lambda: {
        "text_encoder": smollm3(WIDTH, LAYERS - 1),
        "tokenizer": byte_tokenizer(),
    },
    sample=lambda noise, i: {"text_layers": noise(LENGTH + i, LAYERS, WIDTH)},
    read=read,
    write=as_cells,
    start=as_cells,
    state=lambda state: tokens_to_image(state, 1, GRID),
    published=(
        Published(
            "briaai/FIBO",
            {"in_channels": 48, "num_layers": 8},
            {"z_dim": 48, "temperal_downsample": [False, True, True], "patch_size": 2},
            d=48,
            D=768,
        ),
    ),
    options={"guidance_scale": 1.0},
    sizes=Geometry(vae_factor=16, channels=CHANNELS, patch=1),  # the pipeline knows no other factor
    blocks=frozenset(
        {"BriaFiboTransformerBlock", "BriaFiboSingleTransformerBlock", "BriaFiboTextProjection"}
    ),
    loose=frozenset({"text_layers"}),
    raw_latent=encode_frame,
    decoded=decode_frame,
    vae_channels="z_dim",
    mu=straight_mu(1.15),
)
