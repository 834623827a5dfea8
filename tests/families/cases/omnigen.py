"""OmniGen, tiny. Its pipeline always runs a second, unguided prompt beside the first."""

import torch

from asymlift.families.base import Geometry
from tests.families.case import (
    CHANNELS,
    FOUR_LEVELS,
    LENGTH,
    Case,
    Published,
    flow_scheduler,
    kl_vae,
    same,
)
from tests.families.text_parts import byte_tokenizer

VOCABULARY = 259  # of the tokenizer, a token for each byte


CASE = Case(
    transformer={
        "in_channels": CHANNELS,
        "hidden_size": 32,
        "num_attention_heads": 2,
        "num_key_value_heads": 2,
        "intermediate_size": 48,
        "num_layers": 2,
        "pad_token_id": 0,
        "vocab_size": VOCABULARY,
        "time_step_dim": 32,
        "rope_scaling": {"short_factor": [1.0] * 8, "long_factor": [2.0] * 8},
        "pos_embed_max_size": 16,
    },
    vae=kl_vae(levels=4, scaling_factor=0.13025),
    scheduler=flow_scheduler(invert_sigmas=True, num_train_timesteps=1),
    text_parts=lambda: {"tokenizer": byte_tokenizer()},
    sample=lambda noise, i: {
        "input_ids": torch.arange(LENGTH + i) * 37 % VOCABULARY,
    },
    read=lambda call: (
        call["hidden_states"][:1],
        call["timestep"][:1],
        {
            "input_ids": call["input_ids"][:1],
            "written": call["attention_mask"][:1, -1, : call["input_ids"].shape[1]],
        },
    ),
    write=lambda image: torch.cat([image, image]),
    start=same,
    published=(
        Published(
            "Shitao/OmniGen-v1-diffusers",
            {"rope_scaling": {"short_factor": [1.0] * 48, "long_factor": [1.0] * 48}},  # not so
            {"latent_channels": 4} | FOUR_LEVELS,
            d=16,
            D=768,
        ),
    ),
    options={"guidance_scale": 1.0},
    sizes=Geometry(vae_factor=8, channels=CHANNELS, patch=2),
    blocks=frozenset({"OmniGenBlock"}),
    length_name="",
    cuts=(False, False),
    length=160,  # of bytes: the instruction's own come before the prompt's
    loose=frozenset({"input_ids"}),
    levels=lambda scheduler: 1 - scheduler.sigmas[:-1],
    inverted=True,
)
