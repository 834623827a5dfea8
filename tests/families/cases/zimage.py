"""Z-Image, tiny."""

import torch

from tests.families.case import (
    CHANNELS,
    FOUR_LEVELS,
    LENGTH,
    WORDS,
    Case,
    Published,
    flow_scheduler,
    kl_vae,
    same,
    straight_mu,
)
from tests.families.text_parts import qwen3

CASE = Case(
    transformer={
        "in_channels": CHANNELS,
        "dim": 32,
        "n_layers": 2,
        "n_refiner_layers": 1,
        "n_heads": 2,
        "n_kv_heads": 2,
        "cap_feat_dim": WORDS,
        "axes_dims": [4, 6, 6],
        "axes_lens": [64, 32, 32],
    },
    vae=kl_vae(scaling_factor=0.3611, shift_factor=0.1159),
    scheduler=flow_scheduler(shift=3.0),
    text_parts=lambda: qwen3(WORDS, 3, "Qwen3Model"),
    sample=lambda noise, i: {"cap_feats": noise(LENGTH + i, WORDS)},
    read=lambda call: (
        torch.stack(list(call["x"])).squeeze(2),
        call["t"],
        {"cap_feats": call["cap_feats"]},
    ),
    write=lambda image: list(image.unsqueeze(2)),
    start=same,
    published=(
        Published("Tongyi-MAI/Z-Image", {}, {"latent_channels": 16} | FOUR_LEVELS, d=64, D=768),
    ),
    options={"guidance_scale": 0.0},
    answer="x",
    loose=frozenset({"cap_feats"}),
    mu=straight_mu(1.15),
)
