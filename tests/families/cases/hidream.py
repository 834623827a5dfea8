"""HiDream-I1, tiny. Its largest pictures; see test_hidream.py for smaller ones."""

from typing import Any

from asymlift.runtime import third_party
from tests.families.case import (
    CHANNELS,
    FOUR_LEVELS,
    LENGTH,
    WORDS,
    Case,
    Published,
    flow_scheduler,
    kl_vae,
    same,
    straight_mu,
)
from tests.families.text_parts import byte_tokenizer, clip, clip_tokenizer, llama, t5, t5_tokenizer

LAYERS, LLAMA_WIDTH = 3, 16


def text_parts() -> dict[str, Any]:
    widths = {"": 8, "_2": 12}  # 8 + 12 is the width of the pooled embedding
    parts = {f"tokenizer{suffix}": clip_tokenizer() for suffix in widths}
    parts |= {f"text_encoder{suffix}": clip(width, length=128) for suffix, width in widths.items()}
    parts |= {"tokenizer_3": t5_tokenizer(), "text_encoder_3": t5()}
    return parts | {"tokenizer_4": byte_tokenizer(), "text_encoder_4": llama(LLAMA_WIDTH, LAYERS)}


def assemble(parts: dict[str, Any]) -> Any:
    """The pipeline draws pictures of a usual size, whatever is asked: here that is the tests'."""
    pipeline = third_party.library("diffusers").HiDreamImagePipeline(**parts)
    pipeline.default_sample_size = 9.8  # latent cells of a square's side: a bit over 8 x 12
    return pipeline


CASE = Case(
    transformer={
        "patch_size": 2,
        "in_channels": CHANNELS,
        "out_channels": CHANNELS,
        "num_layers": 2,
        "num_single_layers": 2,
        "attention_head_dim": 16,
        "num_attention_heads": 2,
        "caption_channels": [WORDS, LLAMA_WIDTH],
        "text_emb_dim": 20,
        "num_routed_experts": 2,
        "num_activated_experts": 2,  # both, or rounding would choose others
        "axes_dims_rope": (4, 6, 6),
        "max_resolution": (8, 12),
        "llama_layers": [0, 1, 2, 2],
    },
    vae=kl_vae(scaling_factor=0.3611, shift_factor=0.1159),
    scheduler=flow_scheduler(shift=3.0),
    text_parts=text_parts,
    sample=lambda noise, i: {
        "encoder_hidden_states_t5": noise(LENGTH, WORDS),
        "encoder_hidden_states_llama3": noise(LAYERS, LENGTH, LLAMA_WIDTH),
        "pooled_embeds": noise(20),
    },
    read=lambda call: (
        call["hidden_states"],
        call["timesteps"],
        {
            "encoder_hidden_states_t5": call["encoder_hidden_states_t5"],
            "encoder_hidden_states_llama3": call["encoder_hidden_states_llama3"].transpose(0, 1),
            "pooled_embeds": call["pooled_embeds"],
        },
    ),
    write=same,
    start=same,
    published=(
        Published(
            "HiDream-ai/HiDream-I1-Full",
            {
                "patch_size": 2,
                "in_channels": 16,
                "out_channels": 16,
                "caption_channels": [4096, 4096],
                "axes_dims_rope": (64, 32, 32),
                "llama_layers": [*range(32), *[31] * 16],
            },
            {"latent_channels": 16} | FOUR_LEVELS,
            d=64,
            D=768,
        ),
    ),
    options={"guidance_scale": 1.0},
    last_block="single_stream_blocks.1",
    blocks=frozenset({"HiDreamBlock", "TextProjection"}),
    mu=straight_mu(1.15),
    assemble=assemble,
)
