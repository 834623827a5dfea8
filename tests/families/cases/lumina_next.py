"""Lumina-Next, tiny. Its VAE is 8 times down, as the pipeline takes for granted."""

import torch
from torch import Tensor

from asymlift.families.base import Geometry
from tests.families.case import (
    CHANNELS,
    FOUR_LEVELS,
    LENGTH,
    WORDS,
    Case,
    Published,
    flow_scheduler,
    given,
    kl_vae,
    same,
)
from tests.families.text_parts import gemma


def with_variance(image: Tensor) -> Tensor:
    return torch.cat([image, torch.zeros_like(image)], 1)


CASE = Case(
    transformer={
        "sample_size": 16,
        "in_channels": CHANNELS,
        "hidden_size": 32,
        "num_layers": 2,
        "num_attention_heads": 2,
        "num_kv_heads": 1,
        "multiple_of": 16,
        "cross_attention_dim": WORDS,
    },
    vae=kl_vae(levels=4, scaling_factor=0.13025),
    scheduler=flow_scheduler(shift=1.7),
    text_parts=lambda: gemma(WORDS, 3),
    sample=lambda noise, i: {"encoder_hidden_states": noise(LENGTH + i, WORDS)},
    read=lambda call: (
        call["hidden_states"][:, :CHANNELS],  # of an answer, the velocity
        call["timestep"],
        given(call, ("encoder_hidden_states", "encoder_mask")),
    ),
    write=with_variance,
    start=same,
    published=(
        Published(
            "Alpha-VLLM/Lumina-Next-SFT-diffusers",
            {"num_layers": 24, "num_kv_heads": 8},
            {"latent_channels": 4} | FOUR_LEVELS,
            d=16,
            D=768,
        ),
    ),
    options={"guidance_scale": 1.0},
    blocks=frozenset({"LuminaNextDiTBlock"}),
    sizes=Geometry(vae_factor=8, channels=CHANNELS, patch=2),
    length_name="",
    loose=frozenset({"encoder_hidden_states"}),
)
