"""Anima, tiny. Its transformer is that of Cosmos-Predict2, its VAE that of Qwen-Image."""

from typing import Any

from asymlift.runtime import third_party
from tests.families.case import (
    WORDS,
    Case,
    Published,
    decode_frame,
    encode_frame,
    flow_scheduler,
    save_modular,
    seeded,
    unguided_modular,
)
from tests.families.cases.cosmos import CASE as COSMOS
from tests.families.cases.qwenimage import CASE as QWENIMAGE
from tests.families.text_parts import SEED, qwen3, t5_tokenizer, widened

SOURCE = 16  # width of the text encoder


def text_parts() -> dict[str, Any]:
    tokenizer = t5_tokenizer()
    kind = third_party.library("diffusers").AnimaTextConditioner
    net = seeded(
        lambda: kind(
            source_dim=SOURCE,
            target_dim=WORDS,
            model_dim=16,
            num_layers=2,
            num_attention_heads=2,
            target_vocab_size=len(tokenizer),
        ),
        SEED,
    )
    return {
        **qwen3(SOURCE, 2, "Qwen3Model"),
        "t5_tokenizer": tokenizer,
        "text_conditioner": seeded(lambda: widened(net), SEED),
    }


CASE = Case(
    transformer=COSMOS.transformer,
    vae=QWENIMAGE.vae,
    scheduler=flow_scheduler(shift=3.0),
    text_parts=text_parts,
    sample=COSMOS.sample,
    read=COSMOS.read,
    write=COSMOS.write,
    start=COSMOS.start,
    state=COSMOS.state,
    published=(
        # As diffusers' script for it makes them: the transformer of Cosmos-Predict2 2B, whose
        # config the checkpoint states too, and the VAE's defaults.
        Published(
            "circlestone-labs/Anima-Base-v1.0-Diffusers",
            {
                "num_attention_heads": 16,
                "rope_scale": (1.0, 4.0, 4.0),
                "extra_pos_embed_type": None,
            },
            {"z_dim": 16, "temperal_downsample": [False, True, True]},
            d=64,
            D=768,
        ),
    ),
    blocks=COSMOS.blocks,
    raw_latent=encode_frame,
    decoded=decode_frame,
    vae_channels="z_dim",
    assemble=lambda parts: unguided_modular("AnimaModularPipeline", parts),
    save=save_modular,
    drive=lambda pipeline, call: pipeline(**call, output="images"),
)
