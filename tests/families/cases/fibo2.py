"""Bria FIBO 2, tiny."""

from typing import Any

from torch import Tensor

from asymlift.families.base import Text
from tests.families.case import (
    CHANNELS,
    FOUR_LEVELS,
    LENGTH,
    WORDS,
    Case,
    Published,
    flow_scheduler,
    same,
    straight_mu,
)
from tests.families.cases.flux2 import vae
from tests.families.text_parts import qwen3_vl

BUNDLES = 6  # of the text encoder's layers: the pipeline always makes so many


def read(call: dict[str, Any]) -> tuple[Tensor, Tensor, Text]:
    bundles = call["encoder_hidden_states"].transpose(1, 2)
    return call["hidden_states"], call["timestep"], {"encoder_hidden_states": list(bundles)}


CASE = Case(
    transformer={
        "in_channels": CHANNELS,
        "dim": 32,
        "n_layers": BUNDLES,
        "n_refiner_layers": 1,
        "n_heads": 2,
        "t_scale": 100.0,  # at 1000, rounding grows to 1e-4 over seven steps in float32
        "cap_feat_dim": WORDS,
        "injection_layer_ids": (1, 2, 3, 4, 5),
        "perceiver_num_layers": 1,
        "min_num_gist_tokens": 4,
        "max_num_gist_tokens": 8,
        "gist_step": 2,
        "gist_min_text_len": 6,
        "gist_max_text_len": 10,
        "axes_dims": (4, 6, 6),
        "axes_lens": (32, 32, 32),
    },
    vae=vae,
    scheduler=flow_scheduler(use_dynamic_shifting=True),
    text_parts=lambda: qwen3_vl(WORDS // 3, 35),  # the last layer that it reads
    sample=lambda noise, i: {"encoder_hidden_states": noise(LENGTH + i, BUNDLES, WORDS)},
    read=read,
    write=same,
    start=same,
    published=(
        Published("briaai/Fibo-2.0-dev", {}, {"latent_channels": 32} | FOUR_LEVELS, d=128, D=768),
    ),
    options={"guidance_scale": 1.0},
    last_block="layers.5",
    blocks=frozenset({"BriaFibo2TransformerBlock", "BriaFibo2PerceiverLayer"}),
    length_name="",
    length=64,
    loose=frozenset({"encoder_hidden_states"}),
    mu=straight_mu(1.15),
)
