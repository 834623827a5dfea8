"""Ideogram 4, tiny."""

import math
from typing import Any

from torch import Tensor
from torch.nn import functional

from asymlift.families.base import Text
from asymlift.maths.patches import image_to_tokens, tokens_to_image
from asymlift.runtime import third_party
from tests.families.case import (
    CHANNELS,
    FOUR_LEVELS,
    LENGTH,
    Case,
    Published,
    flow_scheduler,
)
from tests.families.cases.flux2 import vae
from tests.families.text_parts import qwen3_vl
from tests.tiny import randomise

GRID, NUM, HIDDEN, LAYERS = (4, 6), 24, 8, 13
MOST = 120  # bytes of the longest prompt: the template's own text comes before it


def read(call: dict[str, Any]) -> tuple[Tensor, Tensor, Text]:
    """Words stand before the picture, padding before the words."""
    tokens = call["hidden_states"][:, -NUM:]
    text: Text = {
        "encoder_hidden_states": call["encoder_hidden_states"][:, :-NUM],
        "encoder_attention_mask": call["indicator"][:, :-NUM] == 3,
    }
    return tokens_to_image(tokens, 2, GRID, "p q c"), call["timestep"], text


def as_tokens(image: Tensor) -> Tensor:
    return image_to_tokens(image, 2, "p q c")


def assemble(parts: dict[str, Any]) -> Any:
    """The second network is of the same width, and its answer is not used unguided."""
    transformer, second = parts["transformer"], None
    if transformer is not None:
        second = type(transformer).from_config(transformer.config).eval()
        randomise(second, seed=7)
    kind = third_party.library("diffusers").Ideogram4Pipeline
    return kind(**parts, unconditional_transformer=second)


def text_parts() -> dict[str, Any]:
    parts = qwen3_vl(HIDDEN, 36, "Qwen3VLModel")  # the last of the layers that it reads
    return {"text_encoder": parts["text_encoder"], "tokenizer": parts["processor"].tokenizer}


CASE = Case(
    transformer={
        "in_channels": 4 * CHANNELS,
        "num_layers": 2,
        "attention_head_dim": 16,
        "num_attention_heads": 2,
        "intermediate_size": 32,
        "adaln_dim": 16,
        "llm_features_dim": LAYERS * HIDDEN,
        "mrope_section": (4, 2, 2),
    },
    vae=vae,
    scheduler=flow_scheduler(),
    text_parts=text_parts,
    sample=lambda noise, i: {"encoder_hidden_states": noise(LENGTH + i, LAYERS * HIDDEN)},
    read=read,
    write=lambda image: functional.pad(as_tokens(image), (0, 0, MOST, 0)),
    start=as_tokens,
    published=(
        Published(
            "ideogram-ai/ideogram-4-fp8",
            {},
            {"latent_channels": 32} | FOUR_LEVELS,
            d=128,
            D=768,
        ),
    ),
    options={"guidance_scale": 1.0, "guidance_schedule": None},
    grid=GRID,
    length=MOST,
    loose=frozenset({"encoder_hidden_states"}),
    state=lambda state: tokens_to_image(state, 2, GRID, "p q c"),
    raw_latent=lambda vae, image: vae.encode(image).latent_dist.mode(),
    own_shift=lambda num_tokens: math.sqrt(num_tokens / 1024),
    assemble=assemble,
)
