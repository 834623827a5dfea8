"""Lumina-Image 2.0, tiny. Its VAE is 8 times down, as the pipeline takes for granted."""

from asymlift.families.base import Geometry
from tests.families.case import (
    FOUR_LEVELS,
    LENGTH,
    WORDS,
    Case,
    Published,
    flow_scheduler,
    kl_vae,
    read_map,
    same,
)
from tests.families.text_parts import gemma2

CHANNELS = 16  # as published: the pipeline's shift depends on it

CASE = Case(
    transformer={
        "sample_size": 16,
        "in_channels": CHANNELS,
        "hidden_size": 32,
        "num_layers": 2,
        "num_refiner_layers": 2,
        "num_attention_heads": 2,
        "num_kv_heads": 1,
        "multiple_of": 16,
        "axes_dim_rope": (4, 6, 6),
        "axes_lens": (256, 32, 32),
        "cap_feat_dim": WORDS,
    },
    vae=kl_vae(levels=4, latent_channels=CHANNELS, scaling_factor=0.3611, shift_factor=0.1159),
    scheduler=flow_scheduler(shift=6.0),
    text_parts=lambda: gemma2(WORDS, 3),
    sample=lambda noise, i: {"encoder_hidden_states": noise(LENGTH + i, WORDS)},
    read=read_map("encoder_hidden_states", "encoder_attention_mask"),
    write=same,
    start=same,
    published=(
        Published(
            "Alpha-VLLM/Lumina-Image-2.0",
            {"cap_feat_dim": 2304},
            {"latent_channels": 16} | FOUR_LEVELS,
            d=64,
            D=768,
        ),
    ),
    options={"guidance_scale": 1.0},
    blocks=frozenset({"Lumina2TransformerBlock"}),
    sizes=Geometry(vae_factor=8, channels=CHANNELS, patch=2),
    length=220,  # of letters: the system's own text comes before the prompt
    loose=frozenset({"encoder_hidden_states"}),
    mu=lambda module, num_tokens, steps: float(module.calculate_shift(CHANNELS)),
)
