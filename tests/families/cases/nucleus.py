"""Nucleus-Image, tiny: a block without experts, and one with."""

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
from tests.families.text_parts import talking_qwen3_vl

CASE = Case(
    transformer={
        "in_channels": 4 * CHANNELS,
        "out_channels": CHANNELS,
        "num_layers": 2,
        "attention_head_dim": 16,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "joint_attention_dim": WORDS,
        "axes_dims_rope": (4, 6, 6),
        "mlp_ratio": 6.0,
        "dense_moe_strategy": "leave_first_block_dense",
        "num_experts": 4,
        "moe_intermediate_dim": 16,
        "capacity_factors": 4.0,  # every expert takes every token, or rounding would choose others
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
    text_parts=lambda: talking_qwen3_vl(WORDS, 9),  # the last layer but seven is read
    sample=lambda noise, i: {"encoder_hidden_states": noise(LENGTH + i, WORDS)},
    read=read_packed("encoder_hidden_states", "encoder_hidden_states_mask"),
    write=as_tokens,
    start=as_tokens,
    published=(
        Published(
            "NucleusAI/Nucleus-Image",
            {
                "out_channels": 16,
                "num_layers": 32,
                "num_key_value_heads": 4,
                "joint_attention_dim": 4096,
                "dense_moe_strategy": "leave_first_three_blocks_dense",
                "num_experts": 64,
                "capacity_factors": 3 * [0.0] + 2 * [4.0] + 27 * [2.0],
                "use_grouped_mm": True,
            },
            {"z_dim": 16, "temperal_downsample": [False, True, True]},
            d=64,
            D=768,
        ),
    ),
    options={"guidance_scale": 1.0},
    length=400,  # of bytes: the system's own text comes before the prompt
    loose=frozenset({"encoder_hidden_states"}),
    raw_latent=encode_frame,
    decoded=decode_frame,
    vae_channels="z_dim",
    mu=straight_mu(1.15),
)
