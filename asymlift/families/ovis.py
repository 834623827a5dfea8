"""Ovis-Image: diffusers OvisImageTransformer2DModel, packed 2x2 latent patches.

Words have positions, on a diagonal; the model attends to their padding, which is zero.
B images, N = h w tokens, L text tokens, C channels.
"""

from typing import Any

from torch import Tensor

from asymlift.families.autoencoder_kl import decode_latents, encode_latents, vae_sizes
from asymlift.families.base import Family, Geometry, Text, interpolated_shift
from asymlift.families.packing import PATCH, diagonal_ids, grid_ids, packed, run_packed
from asymlift.families.targets import DOUBLE_BLOCKS, SINGLE_BLOCKS
from asymlift.families.text import encode_words, stack_text, stacked, words_of

LENGTH = 256  # words that the pipeline pads a prompt to


def run(net: Any, latent: Tensor, time: Tensor, text: Text) -> Tensor:
    """One forward pass. latent (B, C, 2h, 2w), time (B,) -> raw output, same shape."""
    words = stacked(text, "encoder_hidden_states")
    return run_packed(
        net,
        latent,
        encoder_hidden_states=words,
        timestep=time,
        img_ids=grid_ids(latent),
        txt_ids=diagonal_ids(words.shape[1], device=latent.device),
    )


OVIS = Family(
    name="ovis",
    transformer="OvisImageTransformer2DModel",
    pipelines=("OvisImagePipeline",),
    first="x_embedder",
    last="proj_out",
    final_norm="norm_out",
    order_in="c p q",
    order_out="c p q",
    sign=+1,
    geometry=packed(vae_sizes),
    channels=lambda c: {"in_channels": PATCH**2 * c, "out_channels": None},
    time=lambda tau, num_tokens: tau,  # the class multiplies by 1000
    run=run,
    encode_latents=encode_latents,
    decode_latents=decode_latents,
    encode_prompt=encode_words,
    collate=stack_text,
    text_shapes=words_of("encoder_hidden_states", "joint_attention_dim", LENGTH),
    base_shift=interpolated_shift,
    lora_targets=(*DOUBLE_BLOCKS, *SINGLE_BLOCKS, "timestep_embedder.linear_*"),
    checkpoints=("AIDC-AI/Ovis-Image-7B",),
    tier="free",
    sizes=Geometry(vae_factor=8, channels=16, patch=2),
)
