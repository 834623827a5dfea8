"""PRX, tiny, with the VAE that it mostly has."""

from tests.families.case import (
    CHANNELS,
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
from tests.families.text_parts import t5gemma

CASE = Case(
    transformer={
        "in_channels": CHANNELS,
        "context_in_dim": WORDS,
        "hidden_size": 32,
        "mlp_ratio": 2.0,
        "num_heads": 2,
        "depth": 2,
        "axes_dim": [8, 8],
    },
    vae=kl_vae(scaling_factor=0.3611, shift_factor=0.1159),
    scheduler=flow_scheduler(shift=3.0),
    text_parts=lambda: t5gemma(WORDS, 256),
    sample=lambda noise, i: {"encoder_hidden_states": noise(LENGTH + i, WORDS)},
    read=read_map("encoder_hidden_states", "attention_mask"),
    write=same,
    start=same,
    published=tuple(
        Published(name, {}, {"latent_channels": 16} | FOUR_LEVELS, d=64, D=768)
        for name in (
            "Photoroom/prx-1024-t2i-beta",
            "Photoroom/prx-512-t2i",
            "Photoroom/prx-512-t2i-sft",
            "Photoroom/prx-256-t2i",
            "Photoroom/prx-256-t2i-sft",
        )
    ),
    options={"guidance_scale": 1.0, "use_resolution_binning": False},
    length_name="tokenizer_max_length",
    loose=frozenset({"encoder_hidden_states"}),
)
