"""AuraFlow: diffusers AuraFlowTransformer2DModel, which patches by itself.

Positions come from a learned table, so a picture can have no more rows than the table. The text is
not masked: behind the words the pipeline writes zeros, and the model attends to them.
B images, L text tokens, C channels, q the latent patch.
"""

import math
from typing import Any

from torch import Tensor

from asymlift.families.autoencoder_kl import decode_scaled, encode_scaled, vae_sizes
from asymlift.families.base import (
    Config,
    Family,
    Geometry,
    Grid,
    Text,
    check_grid,
    own_patches,
    plain_shift,
    run_map,
    setting,
)
from asymlift.families.packing import grid_of
from asymlift.families.text import encode_words, stack_text, words_of

LENGTH = 256  # words that the pipeline pads a prompt to


def why_not_grid(config: Config, grid: Grid) -> str | None:
    """Tell what the class does not: beyond its table it would read other positions."""
    most = math.isqrt(setting(config, "pos_embed_max_size"))
    return f"this model knows {most} positions along a side" if max(grid) > most else None


def run(net: Any, latent: Tensor, time: Tensor, text: Text) -> Tensor:
    """One forward pass. latent (B, C, h q, w q), time (B,) -> raw output, same shape."""
    q = net.config.patch_size
    grid = grid_of(latent, q)
    check_grid("auraflow", grid, why_not_grid(net.config, grid))
    return run_map(net, latent, time, text)


AURAFLOW = Family(
    name="auraflow",
    transformer="AuraFlowTransformer2DModel",
    pipelines=("AuraFlowPipeline",),
    first="pos_embed.proj",
    last="proj_out",
    final_norm="norm_out",
    order_in="c p q",
    order_out="p q c",
    sign=+1,
    geometry=own_patches(vae_sizes),
    channels=lambda c: {"in_channels": c, "out_channels": c},
    time=lambda tau, num_tokens: tau,  # the class multiplies by 1000
    run=run,
    encode_latents=encode_scaled,
    decode_latents=decode_scaled,
    encode_prompt=encode_words,
    collate=stack_text,
    text_shapes=words_of("encoder_hidden_states", "joint_attention_dim", LENGTH),
    base_shift=plain_shift,
    lora_targets=(
        "joint_transformer_blocks.*.ff.*",  # linear_1, linear_2, out_projection
        "joint_transformer_blocks.*.ff_context.*",
        "single_transformer_blocks.*.ff.*",
        "*_transformer_blocks.*.attn.to_out.0",
        "time_step_proj.linear_*",
    ),
    checkpoints=("fal/AuraFlow", "fal/AuraFlow-v0.2", "fal/AuraFlow-v0.3"),
    tier="free",
    why_not_grid=why_not_grid,
    sizes=Geometry(vae_factor=8, channels=4, patch=2),
)
