"""FLUX.1 dev and schnell, tiny."""

from typing import Any

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
    read_packed,
    straight_mu,
)
from tests.families.text_parts import clip, clip_tokenizer, t5, t5_tokenizer


def text_parts() -> dict[str, Any]:
    return {
        "text_encoder": clip(20, "CLIPTextModel"),
        "tokenizer": clip_tokenizer(),
        "text_encoder_2": t5(),
        "tokenizer_2": t5_tokenizer(),
    }


CASE = Case(
    transformer={
        "in_channels": 4 * CHANNELS,
        "num_layers": 2,
        "num_single_layers": 2,
        "attention_head_dim": 16,
        "num_attention_heads": 2,
        "joint_attention_dim": WORDS,
        "pooled_projection_dim": 20,
        "axes_dims_rope": (4, 6, 6),
        "guidance_embeds": False,
    },
    vae=kl_vae(scaling_factor=0.3611, shift_factor=0.1159),
    scheduler=flow_scheduler(use_dynamic_shifting=True),
    text_parts=text_parts,
    sample=lambda noise, i: {
        "encoder_hidden_states": noise(LENGTH, WORDS),
        "pooled_projections": noise(20),
    },
    read=read_packed("encoder_hidden_states", "pooled_projections"),
    write=as_tokens,
    start=as_tokens,
    published=(
        Published(
            "black-forest-labs/FLUX.1-dev",
            {"guidance_embeds": True},
            {"latent_channels": 16} | FOUR_LEVELS,
            d=64,
            D=768,
        ),
    ),
    mu=straight_mu(1.15),
)
