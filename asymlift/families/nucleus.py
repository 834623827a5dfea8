"""Nucleus-Image: diffusers NucleusMoEImageTransformer2DModel, packed 2x2 latent patches.

In most blocks each of many experts picks the tokens that it likes best, of a picture, so that
pictures do not disturb each other. The pipeline's guidance keeps tokens' length (`renorm`).
B images, N = h w tokens, L text tokens (differing), C channels.
"""

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from asymlift.families.autoencoder_frames import decode_latents, encode_latents, vae_sizes
from asymlift.families.base import Family, Geometry, Text, interpolated_shift
from asymlift.families.packing import PATCH, grid_of, packed, run_packed
from asymlift.families.text import padded_text, without_padding, words_of
from asymlift.maths.guidance import Renorm

LENGTH, MULTIPLE = 1024, 8  # words of the longest prompt; the pipeline pads to a multiple


def run(net: Any, latent: Tensor, time: Tensor, text: Text) -> Tensor:
    """One forward pass. latent (B, C, 2h, 2w), time (B,) -> raw output, same shape."""
    grid = (1, *grid_of(latent))  # one frame
    _feed_experts_one_type(net)
    return run_packed(net, latent, timestep=time, img_shapes=[grid] * len(latent), **text)


def _feed_experts_one_type(net: Any) -> None:
    """Under autocast a GPU's norms answer in float32, which the class cannot add to bf16 experts.

    The hooks stay, for checkpointing runs the blocks again in the backward pass.
    """
    for block in net.transformer_blocks:
        layer = block.img_mlp
        if block.moe_enabled and _to_autocast not in layer._forward_pre_hooks.values():
            layer.register_forward_pre_hook(_to_autocast)


def _to_autocast(layer: nn.Module, given: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    kind = given[0].device.type
    if not torch.is_autocast_enabled(kind):
        return given
    return tuple(tensor.to(torch.get_autocast_dtype(kind)) for tensor in given)


@torch.no_grad()
def encode_prompt(
    pipeline: Any, prompts: Sequence[str], max_length: int | None = None
) -> list[dict[str, Tensor]]:
    """Embed each prompt, (L, width), without padding, so L differs.

    The pipeline cuts at multiples of eight words; its encoder looks back only, so we can cut more.
    """
    length = max_length or LENGTH
    words, mask = pipeline.encode_prompt(
        prompt=list(prompts), max_sequence_length=MULTIPLE * math.ceil(length / MULTIPLE)
    )
    mask = words.new_ones(words.shape[:2]) if mask is None else mask
    return without_padding("encoder_hidden_states", words, mask, length)


NUCLEUS = Family(
    name="nucleus",
    transformer="NucleusMoEImageTransformer2DModel",
    pipelines=("NucleusMoEImagePipeline",),
    first="img_in",
    last="proj_out",
    final_norm="norm_out",
    order_in="c p q",
    order_out="c p q",
    sign=-1,
    geometry=packed(vae_sizes),
    channels=lambda c: {"in_channels": PATCH**2 * c, "out_channels": c},
    time=lambda tau, num_tokens: tau,  # the class multiplies by 1000
    run=run,
    encode_latents=encode_latents,
    decode_latents=decode_latents,
    encode_prompt=encode_prompt,
    collate=padded_text("encoder_hidden_states", "encoder_hidden_states_mask"),
    text_shapes=words_of("encoder_hidden_states", "joint_attention_dim", LENGTH),
    base_shift=interpolated_shift,
    lora_targets=(  # not the experts, whose weights are no linear layers
        "transformer_blocks.*.img_mlp.net.*",  # of blocks without experts
        "transformer_blocks.*.img_mlp.shared_expert.net.*",
        "transformer_blocks.*.attn.to_out.0",
        "time_text_embed.timestep_embedder.linear_*",
    ),
    checkpoints=("NucleusAI/Nucleus-Image",),
    tier="easy",
    renorm=Renorm(of="tokens"),
    sizes=Geometry(vae_factor=8, channels=16, patch=2),
)
