"""CogView4, tiny. Its VAE is 8 times down, as the model is told the size in pixels."""

from typing import Any

from torch import Tensor

from asymlift.families.base import Geometry
from asymlift.runtime import third_party
from tests.families.case import (
    CHANNELS,
    LENGTH,
    WORDS,
    Case,
    Published,
    flow_scheduler,
    kl_vae,
    read_map,
    same,
)
from tests.families.text_parts import glm, t5_tokenizer

PUBLISHED: dict[str, Any] = {  # of diffusers' conversion script
    "use_dynamic_shifting": True,
    "time_shift_type": "linear",
    "base_shift": 0.25,
    "max_shift": 0.75,
    "base_image_seq_len": 256,
}


def timesteps(levels: Tensor, num_tokens: int) -> Tensor:
    """The times whose levels these are, found by the published scheduler's own shift."""
    third_party.library("diffusers")
    from diffusers.pipelines.cogview4.pipeline_cogview4 import calculate_shift

    mu = calculate_shift(num_tokens)
    return 1000 * flow_scheduler(**PUBLISHED)().time_shift(1 / mu, 1.0, levels)


CASE = Case(
    transformer={
        "in_channels": CHANNELS,
        "out_channels": CHANNELS,
        "num_layers": 2,
        "attention_head_dim": 16,
        "num_attention_heads": 2,
        "text_embed_dim": WORDS,
        "time_embed_dim": 32,
        "condition_dim": 8,
        "rope_axes_dim": (32, 32),
    },
    vae=kl_vae(levels=4, scaling_factor=0.7, shift_factor=0.3),  # its pipeline reads no shift
    scheduler=flow_scheduler(**PUBLISHED),
    text_parts=lambda: {"text_encoder": glm(WORDS), "tokenizer": t5_tokenizer()},
    sample=lambda noise, i: {"encoder_hidden_states": noise(LENGTH + i, WORDS)},
    read=read_map("encoder_hidden_states"),
    write=same,
    start=same,
    published=(
        Published(
            "zai-org/CogView4-6B",
            {"num_layers": 28, "attention_head_dim": 128, "num_attention_heads": 32},
            {"latent_channels": 16, "block_out_channels": [128, 512, 1024, 1024]},
            d=64,
            D=768,
        ),
    ),
    options={"guidance_scale": 1.0},
    blocks=frozenset({"CogView4TransformerBlock"}),
    sizes=Geometry(vae_factor=8, channels=CHANNELS, patch=2),
    loose=frozenset({"encoder_hidden_states"}),
    mu=lambda module, num_tokens, steps: float(module.calculate_shift(num_tokens)),
    timesteps=timesteps,
)
