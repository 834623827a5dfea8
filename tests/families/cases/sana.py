"""SANA, tiny. Its pipeline takes sides of a multiple of 32 pixels."""

from asymlift.families.base import Geometry
from tests.families.case import (
    CHANNELS,
    LENGTH,
    WORDS,
    Case,
    Published,
    diffusers_part,
    flow_scheduler,
    read_map,
    same,
)
from tests.families.text_parts import gemma2

LEVELS = 5

CASE = Case(
    transformer={
        "in_channels": CHANNELS,
        "out_channels": CHANNELS,
        "num_attention_heads": 2,
        "attention_head_dim": 16,
        "num_layers": 2,
        "num_cross_attention_heads": 2,
        "cross_attention_head_dim": 16,
        "cross_attention_dim": 32,
        "caption_channels": WORDS,
        "sample_size": 4,
        "qk_norm": "rms_norm_across_heads",
    },
    vae=diffusers_part(
        "AutoencoderDC",
        latent_channels=CHANNELS,
        encoder_block_out_channels=(8,) * LEVELS,
        decoder_block_out_channels=(8,) * LEVELS,
        encoder_layers_per_block=(1,) * LEVELS,
        decoder_layers_per_block=(1,) * LEVELS,
        encoder_qkv_multiscales=((),) * LEVELS,
        decoder_qkv_multiscales=((),) * LEVELS,
        scaling_factor=0.41407,
    ),
    scheduler=flow_scheduler(shift=3.0),
    text_parts=lambda: gemma2(WORDS, layers=2),
    sample=lambda noise, i: {"encoder_hidden_states": noise(LENGTH + i, WORDS)},
    read=read_map("encoder_hidden_states", "encoder_attention_mask"),
    write=same,
    start=same,
    published=(
        Published(
            "Efficient-Large-Model/Sana_1600M_1024px_BF16_diffusers",
            {},
            {"latent_channels": 32, "encoder_block_out_channels": [128, 256, 512, 512, 1024, 1024]},
            d=32,
            D=3072,
        ),
        Published(
            "Efficient-Large-Model/SANA1.5_4.8B_1024px_diffusers",
            {"num_layers": 60, "qk_norm": "rms_norm_across_heads"},
            {"latent_channels": 32, "encoder_block_out_channels": [128, 256, 512, 512, 1024, 1024]},
            d=32,
            D=3072,
        ),
    ),
    options={"guidance_scale": 1.0, "use_resolution_binning": False},
    blocks=frozenset({"SanaTransformerBlock"}),
    sizes=Geometry(vae_factor=2 ** (LEVELS - 1), channels=CHANNELS, patch=1),
    loose=frozenset({"encoder_hidden_states"}),
    raw_latent=lambda vae, image: vae.encode(image).latent,
)
