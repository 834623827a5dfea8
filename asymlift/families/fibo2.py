"""Bria FIBO 2: diffusers BriaFibo2Transformer2DModel, which patches by itself.

It reads six bundles of the text encoder's layers. Prompts are JSON captions (or short descriptions)
and are cleaned as the pipeline's call cleans them; the empty prompt is the caption with every value
empty that it was trained with for guidance. Texts that a caption asks for are not also drawn for
the text encoder: in the pipeline's words, `render_text_images=False`. A prompt's length decides how
many tokens the model makes of it: samples run one after the other, as many passes on every rank.
B images, L text tokens (differing), K bundles, C channels, q the latent patch.
"""

import json
import sys
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from asymlift.families.autoencoder_flux2 import decode_latents, encode_latents, vae_sizes
from asymlift.families.base import (
    Config,
    Family,
    Geometry,
    Text,
    interpolated_shift,
    own_patches,
    setting,
)
from asymlift.families.text import ragged_text, tokenizer_length

LENGTH = 4096  # words of the longest prompt


def run(net: Any, latent: Tensor, time: Tensor, text: Text) -> Tensor:
    """One forward pass per sample. latent (B, C, h q, w q), time (B,) -> raw output, same shape."""
    out = [
        net(
            hidden_states=one[None],
            timestep=t[None],
            encoder_hidden_states=bundles.transpose(0, 1)[None],  # (1, K, L, width)
            return_dict=False,
        )[0]
        for one, t, bundles in zip(latent, time, text["encoder_hidden_states"], strict=True)
    ]
    return torch.cat(out)


@torch.no_grad()
def encode_prompt(
    pipeline: Any, prompts: Sequence[str], max_length: int | None = None
) -> list[dict[str, Tensor]]:
    """Embed each prompt alone, so without padding, (L, K, width)."""
    with tokenizer_length(pipeline, max_length):
        bundles = [pipeline.encode_prompt(_trained_form(pipeline, one))[0] for one in prompts]
    return [{"encoder_hidden_states": one[0].transpose(0, 1).contiguous()} for one in bundles]


def _trained_form(pipeline: Any, prompt: str) -> str:
    if not prompt:
        module: Any = sys.modules[type(pipeline).__module__]
        return str(module.DEFAULT_NEGATIVE_PROMPT)
    caption, _ = pipeline._parse_prompt(prompt)
    if isinstance(caption, str):
        return prompt
    return json.dumps(caption or {}, separators=(",", ":"), ensure_ascii=False)


def text_shapes(config: Config, length: int | None) -> dict[str, tuple[int, ...]]:
    num_bundles = 1 + len(setting(config, "injection_layer_ids"))
    width = setting(config, "cap_feat_dim")
    return {"encoder_hidden_states": (length or LENGTH, num_bundles, width)}


FIBO2 = Family(
    name="fibo2",
    transformer="BriaFibo2Transformer2DModel",
    pipelines=("BriaFibo2Pipeline",),
    first="x_embedder",
    last="final_layer.linear",
    final_norm="final_layer.adaLN_modulation",  # the norm itself has no weights
    order_in="c p q",
    order_out="c p q",
    sign=+1,
    geometry=own_patches(vae_sizes),
    channels=lambda c: {"in_channels": c},
    time=lambda tau, num_tokens: tau,  # the class multiplies by 1000
    run=run,
    encode_latents=encode_latents,
    decode_latents=decode_latents,
    encode_prompt=encode_prompt,
    collate=ragged_text,
    text_shapes=text_shapes,
    base_shift=interpolated_shift,
    lora_targets=(
        "layers.*.feed_forward.w*",  # w1, w2, w3
        "layers.*.attention.to_out.0",
        "noise_refiner.*.feed_forward.w*",
        "perceiver.layers.*.ffn.w*",
        "t_embedder.mlp.*",
    ),
    checkpoints=("briaai/Fibo-2.0-dev",),
    tier="easy",
    sizes=Geometry(vae_factor=8, channels=32, patch=2),
    heavy_text="18 layers of Qwen3-VL: 92 KB a word, and its captions have hundreds",
)
