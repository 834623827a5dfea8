"""AuraFlow, tiny."""

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
from tests.families.text_parts import t5, t5_tokenizer

CASE = Case(
    transformer={
        "in_channels": CHANNELS,
        "out_channels": CHANNELS,
        "num_mmdit_layers": 2,
        "num_single_dit_layers": 2,
        "attention_head_dim": 16,
        "num_attention_heads": 2,
        "joint_attention_dim": WORDS,
        "caption_projection_dim": 32,
        "pos_embed_max_size": 64,
    },
    vae=kl_vae(scaling_factor=0.13025),
    scheduler=flow_scheduler(shift=1.73),
    text_parts=lambda: {"text_encoder": t5(kind="UMT5"), "tokenizer": t5_tokenizer()},
    sample=lambda noise, i: {"encoder_hidden_states": noise(LENGTH, WORDS)},
    read=read_map("encoder_hidden_states"),
    write=same,
    start=same,
    published=tuple(
        Published(
            f"fal/AuraFlow{version}",
            {"pos_embed_max_size": positions},
            {"latent_channels": 4} | FOUR_LEVELS,
            d=16,
            D=768,
        )
        for version, positions in (("", 64**2), ("-v0.2", 64**2), ("-v0.3", 96**2))
    ),
    options={"guidance_scale": 1.0},
    blocks=frozenset({"AuraFlowJointTransformerBlock", "AuraFlowSingleTransformerBlock"}),
)
