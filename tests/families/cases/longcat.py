"""LongCat-Image, tiny."""

from asymlift.families.base import Geometry
from tests.families.case import (
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
from tests.families.text_parts import byte_tokenizer, qwen2_5_vl

CHANNELS = 16  # the pipeline makes noise of so many, whatever the config says

CASE = Case(
    transformer={
        "in_channels": 4 * CHANNELS,
        "num_layers": 2,
        "num_single_layers": 2,
        "attention_head_dim": 16,
        "num_attention_heads": 2,
        "joint_attention_dim": WORDS,
        "axes_dims_rope": (4, 6, 6),
    },
    vae=kl_vae(latent_channels=CHANNELS, scaling_factor=0.3611, shift_factor=0.1159),
    scheduler=flow_scheduler(use_dynamic_shifting=True),
    text_parts=lambda: {
        "text_encoder": qwen2_5_vl(WORDS),
        "tokenizer": byte_tokenizer(),
        "text_processor": None,  # only rewrites prompts
    },
    sample=lambda noise, i: {"encoder_hidden_states": noise(LENGTH, WORDS)},
    read=read_packed("encoder_hidden_states"),
    write=as_tokens,
    start=as_tokens,
    published=(
        Published(
            "meituan-longcat/LongCat-Image",
            {"num_layers": 10, "num_single_layers": 20},
            {"latent_channels": 16} | FOUR_LEVELS,
            d=64,
            D=768,
        ),
    ),
    options={"guidance_scale": 1.0, "enable_prompt_rewrite": False},
    sizes=Geometry(vae_factor=4, channels=CHANNELS, patch=2),
    length_name="",
    length=512,
    mu=straight_mu(1.15),
)
