"""FLUX.3, tiny. Its pipeline is made of blocks, without the one that rewrites prompts."""

import json
from pathlib import Path
from typing import Any

from torch.nn import functional

from asymlift.maths.patches import tokens_to_image
from asymlift.runtime import third_party
from tests.families.case import (
    CHANNELS,
    LENGTH,
    WORDS,
    Case,
    as_tokens,
    flow_scheduler,
)
from tests.families.cases.flux2 import vae
from tests.families.text_parts import qwen3_vl


def text_parts() -> dict[str, Any]:
    parts = qwen3_vl(WORDS // 8, 32)  # it stacks eight layers, up to the last
    processor = parts["processor"]
    processor.chat_template = processor.tokenizer.chat_template
    return {"text_encoder": parts["text_encoder"], "tokenizer": processor}


def assemble(parts: dict[str, Any]) -> Any:
    diffusers = third_party.library("diffusers")
    blocks = diffusers.Flux3AutoBlocks()
    blocks.sub_blocks.pop("prompt_upsampler")
    pipeline = diffusers.Flux3ModularPipeline(blocks)
    unguided = diffusers.ClassifierFreeGuidance(enabled=False)
    pipeline.update_components(guider=unguided, **parts)
    return pipeline


def save(pipeline: Any, folder: Path) -> None:
    """As a plain folder, which the modular pipeline reads too."""
    names = ("transformer", "vae", "scheduler", "text_encoder", "tokenizer")
    parts = {name: getattr(pipeline, name) for name in names}
    for name, part in parts.items():
        part.save_pretrained(folder / name)
    index = {name: [type(part).__module__.split(".")[0], type(part).__name__]
             for name, part in parts.items()}  # fmt: skip
    index["_class_name"] = type(pipeline).__name__
    (folder / "model_index.json").write_text(json.dumps(index))


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
    assemble=assemble,
    save=save,
    drive=lambda pipeline, call: pipeline(**call, output="images"),
    loose=frozenset({"encoder_hidden_states"}),
)
