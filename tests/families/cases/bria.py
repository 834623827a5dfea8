"""Bria 3.2, tiny."""

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
from tests.families.text_parts import t5, t5_tokenizer

CASE = Case(
    transformer={
        "in_channels": 4 * CHANNELS,
        "num_layers": 2,
        "num_single_layers": 2,
        "attention_head_dim": 16,
        "num_attention_heads": 2,
        "joint_attention_dim": WORDS,
        "axes_dims_rope": (0, 8, 8),
    },
    vae=kl_vae(scaling_factor=0.13025, shift_factor=None),
    scheduler=flow_scheduler(use_dynamic_shifting=True),
    text_parts=lambda: {"text_encoder": t5(), "tokenizer": t5_tokenizer()},
    sample=lambda noise, i: {"encoder_hidden_states": noise(LENGTH, WORDS)},
    read=read_packed("encoder_hidden_states"),
    write=as_tokens,
    start=as_tokens,
    published=(
        Published(
            "briaai/BRIA-3.2",
            {
                "in_channels": 16,
                "num_layers": 8,
                "num_single_layers": 28,
                "attention_head_dim": 96,
                "axes_dims_rope": (0, 48, 48),
            },
            {"latent_channels": 4} | FOUR_LEVELS,
            d=16,
            D=768,
        ),
    ),
    options={"guidance_scale": 1.0},
    blocks=frozenset({"BriaTransformerBlock", "BriaSingleTransformerBlock"}),
    mu=straight_mu(1.15),
)
