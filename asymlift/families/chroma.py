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

from asymlift.families.autoencoder_kl import decode_latents, encode_latents
from asymlift.families.base import Config, Family, Geometry, Text, interpolated_shift, setting
from asymlift.families.packing import PATCH, grid_ids, packed_geometry
from asymlift.families.text import stack_text
from asymlift.maths.patches import image_to_tokens, tokens_to_image

LENGTH = 512  # words that the pipeline pads a prompt to


def run(net: Any, latent: Tensor, time: Tensor, text: Text) -> Tensor:
    """One forward pass. latent (B, C, 2h, 2w), time (B,) -> raw output, same shape."""
    h, w = latent.shape[-2] // PATCH, latent.shape[-1] // PATCH
    words, mask = text["encoder_hidden_states"], text["attention_mask"]
    assert isinstance(words, Tensor) and isinstance(mask, Tensor)  # the padding stays
    mask = torch.cat([mask, mask.new_ones(len(latent), h * w)], dim=1)
    with _mask_in_checkpoints(net, mask):
        out: Tensor = net(
            hidden_states=image_to_tokens(latent, PATCH),
            encoder_hidden_states=words,
            timestep=time,
            img_ids=grid_ids(h, w, device=latent.device),
            txt_ids=torch.zeros(words.shape[1], 3, device=latent.device),
            attention_mask=mask,
            return_dict=False,
        )[0]
    return tokens_to_image(out, PATCH, (h, w))


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
    length = {} if max_length is None else {"max_sequence_length": max_length}
    words, _, mask, *_ = pipeline.encode_prompt(
        prompt=list(prompts), do_classifier_free_guidance=False, **length
    )
    return [
        {"encoder_hidden_states": one.clone(), "attention_mask": written.clone()}
        for one, written in zip(words, mask, strict=True)
    ]


def text_shapes(config: Config, length: int | None) -> dict[str, tuple[int, ...]]:
    length = length or LENGTH
    width = setting(config, "joint_attention_dim")
    return {"encoder_hidden_states": (length, width), "attention_mask": (length,)}


def base_shift(scheduler: Config, num_tokens: int) -> float:
    """Return the pipeline's time shift."""
    return interpolated_shift(scheduler, num_tokens, max_shift=1.15)


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
    geometry=packed_geometry("chroma"),
    channels=lambda c: {"in_channels": PATCH**2 * c, "out_channels": None},
    time=lambda tau, num_tokens: tau,  # the class multiplies by 1000
    run=run,
    encode_latents=encode_latents,
    decode_latents=decode_latents,
    encode_prompt=encode_prompt,
    collate=stack_text,
    text_shapes=text_shapes,
    base_shift=base_shift,
    lora_targets=(
        "transformer_blocks.*.ff.net.0.proj",
        "transformer_blocks.*.ff.net.2",
        "transformer_blocks.*.ff_context.net.0.proj",
        "transformer_blocks.*.ff_context.net.2",
        "transformer_blocks.*.attn.to_out.0",
        "single_transformer_blocks.*.proj_mlp",
        "single_transformer_blocks.*.proj_out",
        "distilled_guidance_layer.layers.*.linear_*",
    ),
    checkpoints=("lodestones/Chroma1-HD", "lodestones/Chroma1-Base"),
    tier="easy",
    sizes=Geometry(vae_factor=8, channels=16, patch=2),
)
