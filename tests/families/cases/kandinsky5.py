"""Kandinsky 5 T2I, tiny. Its pipeline takes the VAE to be 8 times down."""

from typing import Any

from torch import Tensor

from asymlift.families.base import Geometry
from asymlift.runtime import third_party
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
)
from tests.families.text_parts import byte_tokenizer, clip, clip_tokenizer, qwen2_5_vl


def text_parts() -> dict[str, Any]:
    transformers = third_party.library("transformers")
    return {
        "text_encoder": qwen2_5_vl(WORDS),
        "tokenizer": transformers.Qwen2VLProcessor(
            transformers.Qwen2VLImageProcessor(),
            byte_tokenizer(),
            transformers.Qwen2VLVideoProcessor(),
        ),
        "text_encoder_2": clip(20, "CLIPTextModel", length=77),
        "tokenizer_2": clip_tokenizer(),
    }


def film(image: Tensor) -> Tensor:
    return image.permute(0, 2, 3, 1)[:, None]


def picture(film: Tensor) -> Tensor:
    return film[:, 0].permute(0, 3, 1, 2)


def take_size(pipeline: Any) -> None:
    pipeline.resolutions = [(CASE.width, CASE.height)]  # it knows seven, all of a megapixel


CASE = Case(
    transformer={
        "in_visual_dim": CHANNELS,
        "out_visual_dim": CHANNELS,
        "in_text_dim": WORDS,
        "in_text_dim2": 20,
        "time_dim": 32,
        "model_dim": 32,
        "ff_dim": 48,
        "num_text_blocks": 2,
        "num_visual_blocks": 2,
        "axes_dims": (4, 6, 6),
    },
    vae=kl_vae(levels=4, scaling_factor=0.3611, shift_factor=0.1159),  # it reads no shift
    scheduler=flow_scheduler(shift=5.0),
    text_parts=text_parts,
    sample=lambda noise, i: {
        "encoder_hidden_states": noise(LENGTH + i, WORDS),
        "pooled_projections": noise(20),
    },
    read=lambda call: (
        picture(call["hidden_states"]),
        call["timestep"],
        given(call, ["encoder_hidden_states", "pooled_projections"]),
    ),
    write=film,
    start=film,
    state=picture,
    published=(
        Published(
            "kandinskylab/Kandinsky-5.0-T2I-Lite-sft-Diffusers",
            {
                "in_visual_dim": 16,
                "out_visual_dim": 16,
                "model_dim": 2560,
                "ff_dim": 10240,
                "num_visual_blocks": 50,
                "axes_dims": (32, 48, 48),
            },
            {"latent_channels": 16} | FOUR_LEVELS,
            d=64,
            D=768,
        ),
    ),
    options={"guidance_scale": 1.0},
    sizes=Geometry(vae_factor=8, channels=CHANNELS, patch=2),
    length=200,  # of bytes: the template's own text comes before the prompt
    loose=frozenset({"encoder_hidden_states"}),
    told=take_size,
)
