"""Qwen-Image, tiny."""

from tests.families.case import (
    CHANNELS,
    LENGTH,
    WORDS,
    Case,
    Published,
    as_tokens,
    decode_frame,
    diffusers_part,
    encode_frame,
    flow_scheduler,
    read_packed,
    straight_mu,
)
from tests.families.text_parts import byte_tokenizer, qwen2_5_vl

CASE = Case(
    transformer={
        "in_channels": 4 * CHANNELS,
        "out_channels": CHANNELS,
        "num_layers": 2,
        "attention_head_dim": 16,
        "num_attention_heads": 2,
        "joint_attention_dim": WORDS,
        "axes_dims_rope": (4, 6, 6),
    },
    vae=diffusers_part(
        "AutoencoderKLQwenImage",
        base_dim=8,
        z_dim=CHANNELS,
        dim_mult=[1, 1, 1],
        num_res_blocks=1,
        temperal_downsample=[False, True],
        latents_mean=[0.3, -0.2, 0.1, 0.4],
        latents_std=[1.3, 0.8, 2.0, 0.7],
    ),
    scheduler=flow_scheduler(use_dynamic_shifting=True),
    text_parts=lambda: {"text_encoder": qwen2_5_vl(WORDS), "tokenizer": byte_tokenizer()},
    sample=lambda noise, i: {"encoder_hidden_states": noise(LENGTH + i, WORDS)},
    read=read_packed("encoder_hidden_states", "encoder_hidden_states_mask"),
    write=as_tokens,
    start=as_tokens,
    published=(
        Published(
            "Qwen/Qwen-Image",
            {},
            {"z_dim": 16, "temperal_downsample": [False, True, True]},
            d=64,
            D=768,
        ),
    ),
    length=160,  # of bytes: the template's own text comes before the prompt
    loose=frozenset({"encoder_hidden_states"}),
    raw_latent=encode_frame,
    decoded=decode_frame,
    vae_channels="z_dim",
    mu=straight_mu(1.15),
)
