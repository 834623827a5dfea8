"""Lumina-Image 2.0: diffusers Lumina2Transformer2DModel, which patches by itself.

It counts time backwards. Positions are looked up in tables of so many words, rows and columns.
Every prompt stands behind a system's own, but for the empty one, which is empty.
The pipeline's guidance keeps the length of each row of the latent map (`renorm`).
B images, L text tokens (differing), C channels, q the latent patch.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from asymlift.errors import BadData
from asymlift.families.autoencoder_kl import decode_latents, encode_latents, vae_sizes
from asymlift.families.base import (
    Config,
    Family,
    Geometry,
    Grid,
    Text,
    check_grid,
    interpolated_shift,
    own_patches,
    run_map,
    setting,
)
from asymlift.families.packing import grid_of
from asymlift.families.text import at_most, padded_text, stacked, words_of
from asymlift.maths.guidance import Renorm

CHANNELS = 16  # of published latents: the pipeline's shift counts them instead of tokens
LENGTH = 256  # words of the longest prompt


def why_not_grid(config: Config, grid: Grid) -> str | None:
    """Tell what has no place in the tables: on a GPU the class would end the process."""
    _, rows, columns = setting(config, "axes_lens")
    if grid[0] <= rows and grid[1] <= columns:
        return None
    return f"this model knows {rows} rows and {columns} columns"


def run(net: Any, latent: Tensor, time: Tensor, text: Text) -> Tensor:
    """One forward pass. latent (B, C, h q, w q), time (B,) -> raw output, same shape."""
    q, words = net.config.patch_size, stacked(text, "encoder_hidden_states").shape[1]
    grid = grid_of(latent, q)
    check_grid("lumina2", grid, why_not_grid(net.config, grid))
    if words >= (most := net.config.axes_lens[0]):  # the picture stands right behind them
        raise BadData(
            f"lumina2: a prompt of {words} words is too long, as this model knows {most} "
            "positions, of which a picture takes one; use a smaller model.text_length"
        )
    return run_map(net, latent, time, text)


@torch.no_grad()
def encode_prompt(
    pipeline: Any, prompts: Sequence[str], max_length: int | None = None
) -> list[dict[str, Tensor]]:
    """Embed each prompt, (L, width), without padding, so L differs."""
    *written, empty, empty_mask = pipeline.encode_prompt(
        prompt=list(prompts), do_classifier_free_guidance="" in prompts, **at_most(max_length)
    )
    samples = []
    for i, prompt in enumerate(prompts):
        words, mask = written if prompt else (empty, empty_mask)
        samples.append({"encoder_hidden_states": words[i][mask[i].bool()].clone()})
    return samples


def base_shift(scheduler: Config, num_tokens: int) -> float:
    """Return the pipeline's time shift: 6 in the published checkpoint, the same for all sizes."""
    return interpolated_shift(scheduler, CHANNELS)


def picture_behind_words(read: Tensor, text: Text, num_tokens: int) -> Tensor:
    """`last_reads`: in each sample the picture begins where its own words end."""
    num_words = stacked(text, "encoder_attention_mask").sum(dim=1)
    places = num_words[:, None] + torch.arange(num_tokens, device=read.device)
    return read.take_along_dim(places[..., None], dim=1)


LUMINA2 = Family(
    name="lumina2",
    transformer="Lumina2Transformer2DModel",
    pipelines=("Lumina2Pipeline",),
    first="x_embedder",
    last="norm_out.linear_2",
    final_norm="norm_out.linear_1",  # the norm itself has no weights
    order_in="p q c",
    order_out="p q c",
    sign=-1,
    geometry=own_patches(vae_sizes),
    channels=lambda c: {"in_channels": c, "out_channels": None},
    time=lambda tau, num_tokens: 1 - tau,  # not 1000 times that
    run=run,
    encode_latents=encode_latents,
    decode_latents=decode_latents,
    encode_prompt=encode_prompt,
    collate=padded_text("encoder_hidden_states", "encoder_attention_mask"),
    text_shapes=words_of("encoder_hidden_states", "cap_feat_dim", LENGTH),
    base_shift=base_shift,
    lora_targets=(
        "layers.*.feed_forward.linear_*",  # 1, 2, 3
        "noise_refiner.*.feed_forward.linear_*",
        "context_refiner.*.feed_forward.linear_*",
        "time_caption_embed.timestep_embedder.linear_*",
        "layers.*.attn.to_out.0",
    ),
    checkpoints=("Alpha-VLLM/Lumina-Image-2.0",),
    tier="free",
    renorm=Renorm(of="rows"),
    last_reads=picture_behind_words,
    why_not_grid=why_not_grid,
    sizes=Geometry(vae_factor=8, channels=16, patch=2),
)
