"""Cosmos-Predict2 Text2Image, tiny."""

import importlib
from typing import Any

from torch import Tensor

from asymlift.runtime import third_party
from tests.families.case import (
    CHANNELS,
    LENGTH,
    WORDS,
    Case,
    Published,
    decode_frame,
    diffusers_part,
    encode_frame,
    flow_scheduler,
    given,
)
from tests.families.text_parts import t5, t5_tokenizer


class Guardrail:
    """Stands in for NVIDIA's, a package of its own: finds nothing wrong with random pictures."""

    def to(self, device: Any) -> None:
        pass

    def check_text_safety(self, prompt: str) -> bool:
        return True

    def check_video_safety(self, frames: Any) -> Any:
        return frames


def text_parts() -> dict[str, Any]:
    third_party.prepare()
    module = importlib.import_module("diffusers.pipelines.cosmos.pipeline_cosmos2_text2image")
    module.CosmosSafetyChecker = Guardrail  # what it makes when it is given none
    return {"text_encoder": t5(), "tokenizer": t5_tokenizer()}


def level(ratio: Tensor) -> Tensor:
    """The pipeline's ratio of noise to picture, as a level."""
    return ratio / (1 + ratio)


CASE = Case(
    transformer={
        "in_channels": CHANNELS,
        "out_channels": CHANNELS,
        "num_attention_heads": 2,
        "attention_head_dim": 16,
        "num_layers": 2,
        "text_embed_dim": WORDS,
        "adaln_lora_dim": 8,
        "max_size": (4, 32, 32),
        "rope_scale": (1.0, 4.0, 4.0),
        "extra_pos_embed_type": None,
    },
    vae=diffusers_part(
        "AutoencoderKLWan",
        base_dim=8,
        z_dim=CHANNELS,
        dim_mult=[1, 1, 1],
        num_res_blocks=1,
        temperal_downsample=[False, True],
        latents_mean=[0.3, -0.2, 0.1, 0.4],
        latents_std=[1.3, 0.8, 2.0, 0.7],
    ),
    scheduler=flow_scheduler(use_karras_sigmas=True),
    text_parts=text_parts,
    sample=lambda noise, i: {"encoder_hidden_states": noise(LENGTH, WORDS)},
    read=lambda call: (
        call["hidden_states"].squeeze(2),
        call["timestep"],
        given(call, ["encoder_hidden_states"]),
    ),
    write=lambda image: image.unsqueeze(2),
    start=lambda image: image.unsqueeze(2),
    state=lambda state: state.squeeze(2),
    published=(
        Published(
            "nvidia/Cosmos-Predict2-2B-Text2Image",
            {
                "num_attention_heads": 16,
                "rope_scale": (1.0, 4.0, 4.0),
                "extra_pos_embed_type": None,
            },
            {"z_dim": 16, "temperal_downsample": [False, True, True]},
            d=64,
            D=768,
        ),
        Published(
            "nvidia/Cosmos-Predict2-14B-Text2Image",
            {
                "num_attention_heads": 40,
                "num_layers": 36,
                "rope_scale": (1.0, 4.0, 4.0),
                "extra_pos_embed_type": None,
            },
            {"z_dim": 16, "temperal_downsample": [False, True, True]},
            d=64,
            D=768,
        ),
    ),
    options={"guidance_scale": 1.0},
    blocks=frozenset({"CosmosTransformerBlock"}),
    raw_latent=encode_frame,
    decoded=decode_frame,
    vae_channels="z_dim",
    levels=lambda scheduler: level(scheduler.sigmas[:-1]),
    sigmas=lambda levels: levels / (1 - levels),
    most_noise=80 / 81,
    rounding=0.15,  # noise is left, at a level of 0.002, and the guardrail is shown 8 bits
)
