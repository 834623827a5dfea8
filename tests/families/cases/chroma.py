"""Chroma, tiny."""

from typing import Any

import torch
from torch import Tensor

from asymlift.families.base import Text
from asymlift.maths.patches import tokens_to_image
from tests.families.case import (
    CHANNELS,
    FOUR_LEVELS,
    LENGTH,
    WORDS,
    Case,
    Published,
    as_tokens,
    flow_scheduler,
    kl_vae,
    straight_mu,
)
from tests.families.text_parts import t5, t5_tokenizer


def read(call: dict[str, Any]) -> tuple[Tensor, Tensor, Text]:
    words = call["encoder_hidden_states"]
    text: Text = {
        "encoder_hidden_states": words,
        "attention_mask": call["attention_mask"][:, : words.shape[1]],
    }
    return tokens_to_image(call["hidden_states"], 2, (4, 6)), call["timestep"], text


CASE = Case(
    transformer={
        "in_channels": 4 * CHANNELS,
        "num_layers": 2,
        "num_single_layers": 2,
        "attention_head_dim": 16,
        "num_attention_heads": 2,
        "joint_attention_dim": WORDS,
        "axes_dims_rope": (4, 6, 6),
        "approximator_hidden_dim": 32,
        "approximator_layers": 2,
    },
    vae=kl_vae(scaling_factor=0.3611, shift_factor=0.1159),
    scheduler=flow_scheduler(use_dynamic_shifting=True),
    text_parts=lambda: {"text_encoder": t5(), "tokenizer": t5_tokenizer()},
    sample=lambda noise, i: {
        "encoder_hidden_states": noise(LENGTH, WORDS),
        "attention_mask": (torch.arange(LENGTH) <= 3 + i).float(),
    },
    read=read,
    write=as_tokens,
    start=as_tokens,
    published=(
        Published("lodestones/Chroma1-HD", {}, {"latent_channels": 16} | FOUR_LEVELS, d=64, D=768),
    ),
    options={"guidance_scale": 1.0},
    blocks=frozenset(  # the last two are of the network that makes the modulations
        {
            "ChromaTransformerBlock",
            "ChromaSingleTransformerBlock",
            "PixArtAlphaTextProjection",
            "RMSNorm",
        }
    ),
    mu=straight_mu(1.15),
    shared_modulation="one network makes the modulations of all layers",
)
