"""Lumina-Next: diffusers LuminaNextDiT2DModel, which patches by itself.

It counts time backwards, and its positions are stretched so that pictures of any size span as much
as the usual one. Behind the velocity it answers a learned variance, which no flow uses: the lifted
model has none. Prompts are put in small letters; the pipeline also cleans them, where two further
packages are installed, and guides the first three channels only.
B images, L text tokens (differing), C channels, q the latent patch.
"""

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from asymlift.families.autoencoder_kl import decode_scaled, encode_scaled, vae_sizes
from asymlift.families.base import Family, Geometry, Text, own_patches, plain_shift
from asymlift.families.packing import grid_of
from asymlift.families.text import padded_text, stacked, tokenizer_length, without_padding, words_of

LENGTH, MULTIPLE = 256, 8  # words of the longest prompt; the pipeline pads to a multiple
WORDS = "encoder_hidden_states"
SLOWEST = 10000.0  # the longest of the wave lengths of positions, over 2 pi


def run(net: Any, latent: Tensor, time: Tensor, text: Text) -> Tensor:
    """One forward pass. latent (B, C, h q, w q), time (B,) -> raw output, same shape."""
    q, usual = net.config.patch_size, net.config.sample_size  # latent cells of the usual side
    h, w = grid_of(latent, q)
    stretch = math.sqrt(latent.shape[-2] * latent.shape[-1]) / usual
    words = stacked(text, WORDS)
    own = net.time_caption_embed.caption_embedder[0].weight.dtype  # the norm takes no other
    out: Tensor = net(
        hidden_states=latent,
        timestep=time,
        image_rotary_emb=turns(net.head_dim, h, w, stretch, latent.device),
        cross_attention_kwargs={"base_sequence_length": (usual // 2) ** 2},
        return_dict=False,
        **{**text, WORDS: words.to(own)},
    )[0]
    return out[:, : latent.shape[1]]


def turns(width: int, h: int, w: int, stretch: float, device: torch.device) -> Tensor:
    """Return (h, w, width / 2) complex numbers: by turns, what a row and a column turn by."""
    pace = SLOWEST ** -torch.arange(0, 1, 4 / width, device=device) / stretch

    def turn(side: int) -> Tensor:
        angles = torch.outer(torch.arange(side, device=device), pace)
        return torch.polar(torch.ones_like(angles), angles)

    rows, columns = turn(h)[:, None].expand(h, w, -1), turn(w)[None].expand(h, w, -1)
    return torch.stack([rows, columns], dim=-1).flatten(2)


@torch.no_grad()
def encode_prompt(
    pipeline: Any, prompts: Sequence[str], max_length: int | None = None
) -> list[dict[str, Tensor]]:
    """Embed each prompt, (L, width), without padding, so L differs.

    The pipeline cuts at multiples of eight words; its encoder looks back only, so we can cut more.
    """
    length = max_length or LENGTH
    with tokenizer_length(pipeline, MULTIPLE * math.ceil(length / MULTIPLE), "max_sequence_length"):
        words, mask, *_ = pipeline.encode_prompt(
            prompt=list(prompts), do_classifier_free_guidance=False
        )
    return without_padding(WORDS, words, mask, length)


LUMINA_NEXT = Family(
    name="lumina_next",
    transformer="LuminaNextDiT2DModel",
    pipelines=("LuminaPipeline",),
    first="patch_embedder.proj",
    last="norm_out.linear_2",
    final_norm="norm_out.linear_1",  # the norm itself has no weights
    order_in="c p q",
    order_out="p q c",
    sign=-1,
    geometry=own_patches(vae_sizes),
    channels=lambda c: {"in_channels": c, "learn_sigma": False},
    time=lambda tau, num_tokens: 1 - tau,  # not 1000 times that
    run=run,
    encode_latents=encode_scaled,
    decode_latents=decode_scaled,
    encode_prompt=encode_prompt,
    collate=padded_text(WORDS, "encoder_mask"),
    text_shapes=words_of(WORDS, "cross_attention_dim", LENGTH),
    base_shift=plain_shift,
    lora_targets=(
        "layers.*.feed_forward.linear_*",  # 1, 2, 3
        "layers.*.attn2.to_out.0",  # of both attentions
        "time_caption_embed.timestep_embedder.linear_*",
    ),
    checkpoints=("Alpha-VLLM/Lumina-Next-SFT-diffusers",),
    tier="easy",
    sizes=Geometry(vae_factor=8, channels=4, patch=2),
    unproven={
        "sampling": "LuminaPipeline drops half of the channels, a variance, which was not lifted"
    },
)
