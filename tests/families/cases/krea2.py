"""Krea 2, tiny."""

from typing import Any

from tests.families.case import (
    CHANNELS,
    LENGTH,
    WORDS,
    Case,
    Published,
    as_tokens,
    decode_frame,
    diffusers_part,
    encode_frame,
    flow_scheduler,
    read_packed,
)
from tests.families.text_parts import qwen3_vl

LAYERS = (1, 2, 4)  # of the text encoder, published: 2, 5, 8 ... 35


def text_parts() -> dict[str, Any]:
    parts = qwen3_vl(WORDS, 5, "Qwen3VLModel")
    return {"text_encoder": parts["text_encoder"], "tokenizer": parts["processor"].tokenizer}


CASE = Case(
    transformer={
        "in_channels": 4 * CHANNELS,
        "num_layers": 2,
        "attention_head_dim": 16,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "intermediate_size": 32,
        "timestep_embed_dim": 32,
        "text_hidden_dim": WORDS,
        "num_text_layers": len(LAYERS),
        "text_num_attention_heads": 2,
        "text_num_key_value_heads": 2,
        "text_intermediate_size": 32,
        "num_layerwise_text_blocks": 2,
        "num_refiner_text_blocks": 2,
        "axes_dims_rope": (4, 6, 6),
    },
    vae=diffusers_part(
        "AutoencoderKLQwenImage",
        base_dim=8,
        z_dim=CHANNELS,
        dim_mult=[1, 1, 1],
        num_res_blocks=1,
        temperal_downsample=[False, True],
        latents_mean=[0.3, -0.2, 0.1, 0.4],
        latents_std=[1.3, 0.8, 2.0, 0.7],
    ),
    scheduler=flow_scheduler(use_dynamic_shifting=True, max_image_seq_len=6400),
    text_parts=text_parts,
    sample=lambda noise, i: {"encoder_hidden_states": noise(LENGTH + i, len(LAYERS), WORDS)},
    read=read_packed("encoder_hidden_states", "encoder_attention_mask"),
    write=as_tokens,
    start=as_tokens,
    published=(
        Published(
            "krea/Krea-2-Raw",
            {},
            {"z_dim": 16, "temperal_downsample": [False, True, True]},
            d=64,
            D=768,
        ),
    ),
    options={"guidance_scale": 0.0},
    blocks=frozenset({"Krea2TextFusionBlock", "Krea2TransformerBlock"}),
    length=200,  # of bytes: the template's own text comes before the prompt
    pipeline_parts={"text_encoder_select_layers": LAYERS},
    loose=frozenset({"encoder_hidden_states"}),
    raw_latent=encode_frame,
    decoded=decode_frame,
    vae_channels="z_dim",
    mu=lambda module, num_tokens, steps: float(
        module.calculate_shift(num_tokens, max_seq_len=6400)
    ),
)
