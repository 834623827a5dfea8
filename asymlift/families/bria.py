"""Bria 3.2: diffusers BriaTransformer2DModel, packed 2x2 latent patches.

Guidance is against no text at all: the embedding of the empty prompt is zero, as the padding is,
which the model attends to.
B images, N = h w tokens, L text tokens, C channels.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from asymlift.families.autoencoder_kl import decode_latents, encode_latents
from asymlift.families.base import Config, Family, Geometry, Text, interpolated_shift, setting
from asymlift.families.packing import PATCH, grid_ids, packed_geometry
from asymlift.families.text import dtype_without_transformer, stack_text
from asymlift.maths.patches import image_to_tokens, tokens_to_image

LENGTH = 128  # words that the pipeline pads a prompt to


def run(net: Any, latent: Tensor, time: Tensor, text: Text) -> Tensor:
    """One forward pass. latent (B, C, 2h, 2w), time (B,) -> raw output, same shape."""
    h, w = latent.shape[-2] // PATCH, latent.shape[-1] // PATCH
    words = text["encoder_hidden_states"]
    assert isinstance(words, Tensor)
    out: Tensor = net(
        hidden_states=image_to_tokens(latent, PATCH),
        encoder_hidden_states=words,
        timestep=time,
        img_ids=grid_ids(h, w, device=latent.device),
        txt_ids=torch.zeros(words.shape[1], 3, device=latent.device),
        return_dict=False,
    )[0]
    return tokens_to_image(out, PATCH, (h, w))


@torch.no_grad()
def encode_prompt(
    pipeline: Any, prompts: Sequence[str], max_length: int | None = None
) -> list[dict[str, Tensor]]:
    """Embed each prompt, (L, width), zeros behind it included."""
    length = {} if max_length is None else {"max_sequence_length": max_length}
    with dtype_without_transformer(pipeline):
        words, _, _ = pipeline.encode_prompt(
            prompt=list(prompts), do_classifier_free_guidance=False, **length
        )
    return [
        {"encoder_hidden_states": one.clone() if prompt else torch.zeros_like(one)}
        for prompt, one in zip(prompts, words, strict=True)
    ]


def base_shift(scheduler: Config, num_tokens: int) -> float:
    """Return the pipeline's time shift."""
    return interpolated_shift(scheduler, num_tokens, max_shift=1.15)


BRIA = Family(
    name="bria",
    transformer="BriaTransformer2DModel",
    pipelines=("BriaPipeline",),
    first="x_embedder",
    last="proj_out",
    final_norm="norm_out",
    order_in="c p q",
    order_out="c p q",
    sign=+1,
    geometry=packed_geometry("bria"),
    channels=lambda c: {"in_channels": PATCH**2 * c},
    time=lambda tau, num_tokens: 1000 * tau,
    run=run,
    encode_latents=encode_latents,
    decode_latents=decode_latents,
    encode_prompt=encode_prompt,
    collate=stack_text,
    text_shapes=lambda config, length: {
        "encoder_hidden_states": (length or LENGTH, setting(config, "joint_attention_dim"))
    },
    base_shift=base_shift,
    lora_targets=(
        "transformer_blocks.*.ff.net.0.proj",
        "transformer_blocks.*.ff.net.2",
        "transformer_blocks.*.ff_context.net.0.proj",
        "transformer_blocks.*.ff_context.net.2",
        "transformer_blocks.*.attn.to_out.0",
        "single_transformer_blocks.*.proj_mlp",
        "single_transformer_blocks.*.proj_out",
        "time_embed.timestep_embedder.linear_*",
    ),
    checkpoints=("briaai/BRIA-3.2",),
    tier="free",
    text_needs_vae=True,
    sizes=Geometry(vae_factor=8, channels=4, patch=2),
)
