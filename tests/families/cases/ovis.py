"""Ovis-Image, tiny."""

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
from tests.families.text_parts import qwen3

CASE = Case(
    transformer={
        "in_channels": 4 * CHANNELS,
        "out_channels": None,
        "num_layers": 2,
        "num_single_layers": 2,
        "attention_head_dim": 16,
        "num_attention_heads": 2,
        "joint_attention_dim": WORDS,
        "axes_dims_rope": (4, 6, 6),
    },
    vae=kl_vae(scaling_factor=0.3611, shift_factor=0.1159),
    scheduler=flow_scheduler(use_dynamic_shifting=True),
    text_parts=lambda: qwen3(WORDS, 2, "Qwen3Model"),
    sample=lambda noise, i: {"encoder_hidden_states": noise(LENGTH, WORDS)},
    read=read_packed("encoder_hidden_states"),
    write=as_tokens,
    start=as_tokens,
    published=(
        Published("AIDC-AI/Ovis-Image-7B", {}, {"latent_channels": 16} | FOUR_LEVELS, d=64, D=768),
    ),
    options={"guidance_scale": 1.0},
    length=150,  # of bytes: the system's own text comes before the prompt
    mu=straight_mu(1.15),
)
