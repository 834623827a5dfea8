"""HunyuanImage 2.1, tiny."""

from typing import Any

from asymlift.families.base import Geometry
from asymlift.runtime import third_party
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
from tests.families.text_parts import byte_tokenizer, qwen2_5_vl, t5

GLYPH_WIDTH = 16


def text_parts() -> dict[str, Any]:
    letters = third_party.library("transformers").ByT5Tokenizer()
    return {
        "text_encoder": qwen2_5_vl(WORDS, layers=4),  # all but the last two are used
        "tokenizer": byte_tokenizer(),
        "text_encoder_2": t5(GLYPH_WIDTH, vocabulary=len(letters)),
        "tokenizer_2": letters,
    }


CASE = Case(
    transformer={
        "in_channels": CHANNELS,
        "out_channels": CHANNELS,
        "num_attention_heads": 2,
        "attention_head_dim": 16,
        "num_layers": 2,
        "num_single_layers": 2,
        "num_refiner_layers": 2,
        "text_embed_dim": WORDS,
        "text_embed_2_dim": GLYPH_WIDTH,
        "rope_axes_dim": (8, 8),
    },
    vae=diffusers_part(
        "AutoencoderKLHunyuanImage",
        in_channels=3,
        out_channels=3,
        latent_channels=CHANNELS,
        block_out_channels=(32, 32, 32),
        layers_per_block=1,
        spatial_compression_ratio=4,
        sample_size=32,
        scaling_factor=0.75289,
    ),
    scheduler=flow_scheduler(shift=5.0),
    text_parts=text_parts,
    sample=lambda noise, i: {
        "encoder_hidden_states": noise(LENGTH + i, WORDS),
        "encoder_hidden_states_2": noise(3 * i, GLYPH_WIDTH),
    },
    read=read_map(
        "encoder_hidden_states",
        "encoder_attention_mask",
        "encoder_hidden_states_2",
        "encoder_attention_mask_2",
    ),
    write=same,
    start=same,
    published=(
        Published(
            "hunyuanvideo-community/HunyuanImage-2.1-Diffusers",
            {"text_embed_2_dim": 1472},
            {"latent_channels": 64, "spatial_compression_ratio": 32},
            d=64,
            D=3072,
        ),
    ),
    options={"prompt": 'a bee that says "hum"'},
    blocks=frozenset(
        {
            "HunyuanImageTransformerBlock",
            "HunyuanImageSingleTransformerBlock",
            "HunyuanImageIndividualTokenRefinerBlock",
        }
    ),
    sizes=Geometry(vae_factor=4, channels=CHANNELS, patch=1),
    length=180,  # of bytes: the template's own text comes before the prompt
    length_name="",
    pipeline_parts={  # a published checkpoint has guiders; these leave the picture unguided
        part: third_party.library("diffusers").AdaptiveProjectedMixGuidance(enabled=False)
        for part in ("guider", "ocr_guider")
    },
    loose=frozenset({"encoder_hidden_states", "encoder_hidden_states_2"}),
)
