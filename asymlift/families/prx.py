"""Photoroom PRX: diffusers PRXTransformer2DModel, which patches by itself.

Its pipeline cleans prompts with ftfy, which is an extra of ours. Most have the VAE of FLUX.1, in
2x2 patches, some a DC-AE, whose cells are 32 pixels wide and a patch each. The class can be told
the size of the latent map too, which the lift leaves as it is.
B images, L text tokens (differing), C channels, q the latent patch.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from asymlift.errors import BadData
from asymlift.families import autoencoder_dc, autoencoder_kl
from asymlift.families.base import Config, Family, Geometry, own_patches, plain_shift, run_map
from asymlift.families.text import padded_text, without_padding, words_of

LENGTH = 256  # words of the longest prompt, as the published tokenizer has it


def _is_dc(vae: Config) -> bool:
    """Whether the config is an AutoencoderDC's, and no AutoencoderKL's."""
    return "encoder_block_out_channels" in vae


def geometry(transformer: Config, vae: Config) -> Geometry:
    """Read the sizes off the two configs."""
    if transformer.get("bottleneck_size") is not None:
        raise BadData(
            f"prx: bottleneck_size is {transformer['bottleneck_size']}, so that two maps in a row "
            "read the latent, as in PRX Pixel; only the models with a single one can be lifted"
        )
    kind = autoencoder_dc if _is_dc(vae) else autoencoder_kl
    return own_patches(kind.vae_sizes)(transformer, vae)


def encode_latents(vae: Any, image: Tensor) -> Tensor:
    """Turn an image in [-1, 1] into the latent (B, C, h, w) that the transformer denoises."""
    if _is_dc(vae.config):
        return autoencoder_dc.encode_latents(vae, image)
    return autoencoder_kl.encode_latents(vae, image)


def decode_latents(vae: Any, z: Tensor) -> Tensor:
    """Turn a latent of the transformer into an image in [-1, 1]."""
    if _is_dc(vae.config):
        return autoencoder_dc.decode_latents(vae, z)
    return autoencoder_kl.decode_latents(vae, z)


@torch.no_grad()
def encode_prompt(
    pipeline: Any, prompts: Sequence[str], max_length: int | None = None
) -> list[dict[str, Tensor]]:
    """Embed each prompt, (L, width), without padding, so L differs."""
    words, masks, _, _ = pipeline.encode_prompt(
        prompt=list(prompts), do_classifier_free_guidance=False, tokenizer_max_length=max_length
    )
    return without_padding("encoder_hidden_states", words, masks)


PRX = Family(
    name="prx",
    transformer="PRXTransformer2DModel",
    pipelines=("PRXPipeline",),
    first="img_in",
    last="final_layer.linear",
    final_norm="final_layer.adaLN_modulation",
    order_in="c p q",
    order_out="c p q",
    sign=+1,
    geometry=geometry,
    channels=lambda c: {"in_channels": c},
    time=lambda tau, num_tokens: tau,
    run=run_map,
    encode_latents=encode_latents,
    decode_latents=decode_latents,
    encode_prompt=encode_prompt,
    collate=padded_text("encoder_hidden_states", "attention_mask"),
    text_shapes=words_of("encoder_hidden_states", "context_in_dim", LENGTH),
    base_shift=plain_shift,
    lora_targets=(
        "blocks.*.gate_proj",
        "blocks.*.up_proj",
        "blocks.*.down_proj",
        "blocks.*.attention.to_out.0",
        "time_in.*_layer",
    ),
    checkpoints=(
        "Photoroom/prx-1024-t2i-beta",
        "Photoroom/prx-512-t2i",
        "Photoroom/prx-512-t2i-sft",
        "Photoroom/prx-512-t2i-dc-ae",
        "Photoroom/prx-512-t2i-dc-ae-sft",
        "Photoroom/prx-256-t2i",
        "Photoroom/prx-256-t2i-sft",
    ),
    tier="easy",
    sizes=Geometry(vae_factor=8, channels=16, patch=2),
    needs={"ftfy": "asymlift[prompts]"},
)
