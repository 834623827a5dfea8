"""Stable Diffusion 3, tiny."""

from typing import Any

from tests.families.case import (
    CHANNELS,
    FOUR_LEVELS,
    LENGTH,
    WORDS,
    Case,
    Published,
    flow_scheduler,
    kl_vae,
    read_map,
    same,
    straight_mu,
)
from tests.families.text_parts import clip, clip_tokenizer, t5, t5_tokenizer


def text_parts() -> dict[str, Any]:
    widths = {"": 8, "_2": 12}  # 8 + 12 is the width of the pooled embedding
    parts = {f"tokenizer{suffix}": clip_tokenizer() for suffix in widths}
    parts |= {f"text_encoder{suffix}": clip(width) for suffix, width in widths.items()}
    return parts | {"tokenizer_3": t5_tokenizer(), "text_encoder_3": t5()}


CASE = Case(
    transformer={
        "sample_size": 16,
        "in_channels": CHANNELS,
        "out_channels": CHANNELS,
        "num_layers": 2,
        "attention_head_dim": 16,
        "num_attention_heads": 2,
        "joint_attention_dim": WORDS,
        "caption_projection_dim": 32,
        "pooled_projection_dim": 20,
        "pos_embed_max_size": 12,
        "dual_attention_layers": (0,),
        "qk_norm": "rms_norm",
    },
    vae=kl_vae(scaling_factor=1.5305, shift_factor=0.0609),
    scheduler=flow_scheduler(shift=3.0),
    text_parts=text_parts,
    sample=lambda noise, i: {
        "encoder_hidden_states": noise(LENGTH, WORDS),
        "pooled_projections": noise(20),
    },
    read=read_map("encoder_hidden_states", "pooled_projections"),
    write=same,
    start=same,
    published=(
        Published(
            "stabilityai/stable-diffusion-3.5-large",
            {
                "in_channels": 16,
                "out_channels": 16,
                "num_layers": 38,
                "num_attention_heads": 38,
                "caption_projection_dim": 2432,
                "pos_embed_max_size": 192,
                "qk_norm": "rms_norm",
            },
            {"latent_channels": 16} | FOUR_LEVELS,
            d=64,
            D=768,
        ),
        Published(
            "stabilityai/stable-diffusion-3.5-medium",
            {
                "in_channels": 16,
                "out_channels": 16,
                "num_layers": 24,
                "num_attention_heads": 24,
                "caption_projection_dim": 1536,
                "pos_embed_max_size": 384,
                "dual_attention_layers": tuple(range(13)),
                "qk_norm": "rms_norm",
            },
            {"latent_channels": 16} | FOUR_LEVELS,
            d=64,
            D=768,
        ),
    ),
    options={"guidance_scale": 1.0},
    blocks=frozenset({"JointTransformerBlock"}),
    mu=straight_mu(1.15),  # a scheduler's own, not the 1.16 that the pipeline would fall back to
    loose=frozenset({"encoder_hidden_states"}),  # CLIP is 77 words long in published ones
)
