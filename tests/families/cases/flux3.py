"""FLUX.3, tiny. Its pipeline is made of blocks, without the one that rewrites prompts."""

from typing import Any

from torch.nn import functional

from asymlift.maths.patches import tokens_to_image
from tests.families.case import (
    CHANNELS,
    LENGTH,
    WORDS,
    Case,
    as_tokens,
    flow_scheduler,
    save_modular,
    unguided_modular,
)
from tests.families.cases.flux2 import vae
from tests.families.text_parts import qwen3_vl


def text_parts() -> dict[str, Any]:
    parts = qwen3_vl(WORDS // 8, 32)  # it stacks eight layers, up to the last
    processor = parts["processor"]
    processor.chat_template = processor.tokenizer.chat_template
    return {"text_encoder": parts["text_encoder"], "tokenizer": processor}


def read(call: dict[str, Any]) -> Any:
    image = tokens_to_image(call["hidden_states"], 2, (4, 6))
    words = {"encoder_hidden_states": list(call["encoder_hidden_states"])}
    return image, call["timestep"], words


CASE = Case(
    transformer={
        "in_channels": 4 * CHANNELS,
        "cond_in_channels": 4 * CHANNELS,
        "num_layers": 2,
        "num_single_layers": 2,
        "attention_head_dim": 16,
        "num_attention_heads": 2,
        "joint_attention_dim": WORDS,
        "timestep_channels": 32,
        "axes_dims_rope": (4, 4, 4, 4),
    },
    vae=vae,
    scheduler=flow_scheduler(shift=6.93),
    text_parts=text_parts,
    sample=lambda noise, i: {"encoder_hidden_states": noise(LENGTH + i, WORDS)},
    read=read,
    write=as_tokens,
    start=lambda image: functional.pixel_unshuffle(image, 2),
    published=(),  # none that we know of, in diffusers' form
    assemble=lambda parts: unguided_modular(
        "Flux3ModularPipeline", parts, without="prompt_upsampler"
    ),
    save=save_modular,
    drive=lambda pipeline, call: pipeline(**call, output="images"),
    loose=frozenset({"encoder_hidden_states"}),
)
