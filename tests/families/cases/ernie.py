"""ERNIE-Image, tiny."""

from torch import Tensor
from torch.nn import functional

from tests.families.case import (
    CHANNELS,
    FOUR_LEVELS,
    LENGTH,
    WORDS,
    Case,
    Published,
    flow_scheduler,
)
from tests.families.cases.flux2 import vae
from tests.families.text_parts import byte_tokenizer, mistral3


def packed(image: Tensor) -> Tensor:
    return functional.pixel_unshuffle(image, 2)


def unpacked(image: Tensor) -> Tensor:
    return functional.pixel_shuffle(image, 2)


CASE = Case(
    transformer={
        "hidden_size": 32,
        "num_attention_heads": 2,
        "num_layers": 2,
        "ffn_hidden_size": 48,
        "in_channels": 4 * CHANNELS,
        "out_channels": 4 * CHANNELS,
        "text_in_dim": WORDS,
        "rope_axes_dim": (4, 6, 6),
    },
    vae=vae,
    scheduler=flow_scheduler(shift=3.0),
    text_parts=lambda: {"text_encoder": mistral3(WORDS), "tokenizer": byte_tokenizer()},
    sample=lambda noise, i: {"text_bth": noise(LENGTH + i, WORDS)},
    read=lambda call: (
        unpacked(call["hidden_states"]),
        call["timestep"],
        {"text_bth": call["text_bth"], "text_lens": call["text_lens"]},
    ),
    write=packed,
    start=packed,
    state=unpacked,
    published=(
        Published(
            "baidu/ERNIE-Image",
            {
                "hidden_size": 4096,
                "num_attention_heads": 32,
                "num_layers": 36,
                "ffn_hidden_size": 12288,
                "text_in_dim": 3072,
            },
            {"latent_channels": 32} | FOUR_LEVELS,
            d=128,
            D=768,
        ),
    ),
    options={"guidance_scale": 1.0},
    length_name="",
    cuts=(True, False),
    loose=frozenset({"text_bth"}),
)
