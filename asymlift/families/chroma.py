"""Chroma: diffusers ChromaTransformer2DModel, a FLUX.1 whose modulations one small network makes.

Two quirks. No norm has weights of its own: what modulates the last map's input is the last layer
of that network, which modulates every block too. And the pipeline's text mask is made of numbers,
so it is added to the attention scores: 1 for words and the first padding, 0 for the padding behind.
A mask of booleans, which would hide that padding, is passed on likewise.
B images, N = h w tokens, L text tokens, C channels.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from asymlift.families.autoencoder_kl import decode_latents, encode_latents, vae_sizes
from asymlift.families.base import Config, Family, Geometry, Text, interpolated_shift, setting
from asymlift.families.packing import PATCH, grid_ids, packed, run_packed
from asymlift.families.targets import DOUBLE_BLOCKS, SINGLE_BLOCKS
from asymlift.families.text import apart, at_most, stack_text, stacked

LENGTH = 512  # words that the pipeline pads a prompt to


def run(net: Any, latent: Tensor, time: Tensor, text: Text) -> Tensor:
    """One forward pass. latent (B, C, 2h, 2w), time (B,) -> raw output, same shape."""
    words, mask = stacked(text, "encoder_hidden_states"), stacked(text, "attention_mask")
    pictures = grid_ids(latent)
    mask = torch.cat([mask, mask.new_ones(len(latent), len(pictures))], dim=1)
    with _mask_in_checkpoints(net, mask):
        return run_packed(
            net,
            latent,
            encoder_hidden_states=words,
            timestep=time,
            img_ids=pictures,
            txt_ids=torch.zeros(words.shape[1], 3, device=latent.device),
            attention_mask=mask,
        )


@contextmanager
def _mask_in_checkpoints(net: Any, mask: Tensor) -> Iterator[None]:
    """Give single blocks the mask where they are checkpointed: there, diffusers forgets it."""
    checkpoint = getattr(net, "_gradient_checkpointing_func", None)
    if checkpoint is None:
        yield
        return
    singles = set(net.single_transformer_blocks)

    def with_mask(block: Any, *given: Any) -> Any:
        hidden_states_time_and_positions = given[:3]
        if block in singles:
            return checkpoint(block, *hidden_states_time_and_positions, mask)
        return checkpoint(block, *given)

    net._gradient_checkpointing_func = with_mask
    try:
        yield
    finally:
        net._gradient_checkpointing_func = checkpoint


@torch.no_grad()
def encode_prompt(
    pipeline: Any, prompts: Sequence[str], max_length: int | None = None
) -> list[dict[str, Tensor]]:
    """Embed each prompt, (L, width), padding included, and the pipeline's mask, (L,)."""
    words, _, mask, *_ = pipeline.encode_prompt(
        prompt=list(prompts), do_classifier_free_guidance=False, **at_most(max_length)
    )
    return apart(encoder_hidden_states=words, attention_mask=mask)


def text_shapes(config: Config, length: int | None) -> dict[str, tuple[int, ...]]:
    length = length or LENGTH
    width = setting(config, "joint_attention_dim")
    return {"encoder_hidden_states": (length, width), "attention_mask": (length,)}


CHROMA = Family(
    name="chroma",
    transformer="ChromaTransformer2DModel",
    pipelines=("ChromaPipeline",),
    first="x_embedder",
    last="proj_out",
    final_norm="distilled_guidance_layer.out_proj",  # see above
    order_in="c p q",
    order_out="c p q",
    sign=+1,
    geometry=packed(vae_sizes),
    channels=lambda c: {"in_channels": PATCH**2 * c, "out_channels": None},
    time=lambda tau, num_tokens: tau,  # the class multiplies by 1000
    run=run,
    encode_latents=encode_latents,
    decode_latents=decode_latents,
    encode_prompt=encode_prompt,
    collate=stack_text,
    text_shapes=text_shapes,
    base_shift=interpolated_shift,
    lora_targets=(*DOUBLE_BLOCKS, *SINGLE_BLOCKS, "distilled_guidance_layer.layers.*.linear_*"),
    checkpoints=("lodestones/Chroma1-HD", "lodestones/Chroma1-Base"),
    tier="easy",
    sizes=Geometry(vae_factor=8, channels=16, patch=2),
)
