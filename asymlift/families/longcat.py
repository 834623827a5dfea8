"""LongCat-Image: diffusers LongCatImageTransformer2DModel, packed 2x2 latent patches.

Words lie on a diagonal of positions and the picture behind their end, wherever that is; the model
attends to padding. The pipeline lets its text encoder rewrite a prompt first, unless told not to
(`enable_prompt_rewrite=False`): captions are encoded as they are written.
B images, N = h w tokens, L text tokens, C channels.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from asymlift.families.autoencoder_kl import decode_latents, encode_latents
from asymlift.families.base import Config, Family, Geometry, Text, interpolated_shift, setting
from asymlift.families.packing import PATCH, diagonal_ids, grid_ids, packed_geometry
from asymlift.families.text import stack_text, tokenizer_length
from asymlift.maths.patches import image_to_tokens, tokens_to_image

LENGTH = 512  # words that the pipeline pads a prompt to; the picture's first position


def run(net: Any, latent: Tensor, time: Tensor, text: Text) -> Tensor:
    """One forward pass. latent (B, C, 2h, 2w), time (B,) -> raw output, same shape."""
    h, w = latent.shape[-2] // PATCH, latent.shape[-1] // PATCH
    words = text["encoder_hidden_states"]
    assert isinstance(words, Tensor)
    corner = torch.tensor([1, LENGTH, LENGTH], device=latent.device)  # 1: a picture, not words
    out: Tensor = net(
        hidden_states=image_to_tokens(latent, PATCH),
        encoder_hidden_states=words,
        timestep=time,
        img_ids=corner + grid_ids(h, w, device=latent.device),
        txt_ids=diagonal_ids(words.shape[1], device=latent.device),
        return_dict=False,
    )[0]
    return tokens_to_image(out, PATCH, (h, w))


@torch.no_grad()
def encode_prompt(
    pipeline: Any, prompts: Sequence[str], max_length: int | None = None
) -> list[dict[str, Tensor]]:
    """Embed each prompt, (L, width)."""
    with tokenizer_length(pipeline, max_length):
        words, _ = pipeline.encode_prompt(prompt=list(prompts))
    return [{"encoder_hidden_states": one.clone()} for one in words]


def base_shift(scheduler: Config, num_tokens: int) -> float:
    """Return the pipeline's time shift."""
    return interpolated_shift(scheduler, num_tokens, max_shift=1.15)


LONGCAT = Family(
    name="longcat",
    transformer="LongCatImageTransformer2DModel",
    pipelines=("LongCatImagePipeline",),
    first="x_embedder",
    last="proj_out",
    final_norm="norm_out",
    order_in="c p q",
    order_out="c p q",
    sign=+1,
    geometry=packed_geometry("longcat"),
    channels=lambda c: {"in_channels": PATCH**2 * c},
    time=lambda tau, num_tokens: tau,  # the class multiplies by 1000
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
    checkpoints=("meituan-longcat/LongCat-Image", "meituan-longcat/LongCat-Image-Dev"),
    tier="free",
    sizes=Geometry(vae_factor=8, channels=16, patch=2),
)
