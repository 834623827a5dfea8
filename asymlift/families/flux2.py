"""FLUX.2 (klein and dev): diffusers Flux2Transformer2DModel, packed 2x2 latent patches.

Reference pictures are further tokens after the picture's, at later moments of a time of their own.
B images, N = h w tokens, R tokens of all references, L text tokens, C channels.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from asymlift.errors import BadData
from asymlift.families.autoencoder_flux2 import PATCH, decode_latents, encode_latents, vae_sizes
from asymlift.families.base import (
    Config,
    Family,
    Geometry,
    ReferencePictures,
    Text,
    plain_shift,
    shift_from_mu,
)
from asymlift.families.packing import grid_of, packed
from asymlift.families.references import references_of
from asymlift.families.text import apart, at_most, stack_text, stacked, words_of
from asymlift.maths.patches import image_to_tokens, tokens_to_image

DISTILLED_GUIDANCE = 4.0  # the pipeline's default for dev, which is told its guidance scale
LENGTH = 512  # words that the pipelines pad a prompt to
APART = 10  # moments from one reference picture to the next; the picture that is drawn is at 0
DEFAULT_STEPS = 50  # of the klein pipeline; below 4300 tokens the time shift depends on it


def geometry(transformer: Config, vae: Config) -> Geometry:
    """Read the sizes off the two configs; the VAE has the patch too, as it normalises patches."""
    if tuple(vae.get("patch_size", (PATCH, PATCH))) != (PATCH, PATCH):
        raise BadData(f"flux2: the VAE's patch_size is {vae['patch_size']}, not {[PATCH, PATCH]}")
    return packed(vae_sizes)(transformer, vae)


def run(net: Any, latent: Tensor, time: Tensor, text: Text) -> Tensor:
    """One forward pass. latent (B, C, 2h, 2w), time (B,) -> raw output, same shape."""
    h, w = grid_of(latent)
    words = stacked(text, "encoder_hidden_states")
    guidance = text.get("guidance")
    if guidance is None and net.config.guidance_embeds:
        guidance = torch.full_like(time, DISTILLED_GUIDANCE)
    maps = [latent, *references_of(text)]
    zero, line = (torch.arange(n, device=latent.device) for n in (1, words.shape[1]))
    out: Tensor = net(
        hidden_states=torch.cat([image_to_tokens(one, PATCH) for one in maps], dim=1),
        encoder_hidden_states=words,
        timestep=time,
        img_ids=torch.cat([positions(one, APART * i) for i, one in enumerate(maps)]),  # (N + R, 4)
        txt_ids=torch.cartesian_prod(zero, zero, zero, line),  # (L, 4)
        guidance=guidance,
        return_dict=False,
    )[0]
    return tokens_to_image(out[:, : h * w], PATCH, (h, w))


def positions(image: Tensor, moment: int) -> Tensor:
    """Return (tokens, 4): the moment, row and column of each token of a map."""
    rows, columns, zero = (torch.arange(n, device=image.device) for n in (*grid_of(image), 1))
    return torch.cartesian_prod(zero + moment, rows, columns, zero)


@torch.no_grad()
def encode_prompt(
    pipeline: Any, prompts: Sequence[str], max_length: int | None = None
) -> list[dict[str, Tensor]]:
    """Embed each prompt, (L, width). The model attends to the padding, so it stays."""
    words, _ = pipeline.encode_prompt(prompt=list(prompts), **at_most(max_length))
    return apart(encoder_hidden_states=words)


def base_shift(scheduler: Config, num_tokens: int) -> float:
    """Return the pipeline's time shift; its mu was fitted by its authors at 10 and 200 steps."""
    if not scheduler.get("use_dynamic_shifting", False):
        return plain_shift(scheduler, num_tokens)
    mu_200 = 0.00016927 * num_tokens + 0.45666666
    mu_10 = 8.73809524e-05 * num_tokens + 1.89833333
    mu = mu_200 + (mu_10 - mu_200) * (200 - DEFAULT_STEPS) / 190
    return shift_from_mu(scheduler, mu_200 if num_tokens > 4300 else mu)


FLUX2 = Family(
    name="flux2",
    transformer="Flux2Transformer2DModel",
    pipelines=("Flux2KleinPipeline", "Flux2Pipeline"),
    first="x_embedder",
    last="proj_out",
    final_norm="norm_out",
    order_in="c p q",
    order_out="c p q",
    sign=+1,
    geometry=geometry,
    channels=lambda c: {"in_channels": PATCH**2 * c, "out_channels": None},
    time=lambda tau, num_tokens: tau,  # the class multiplies by 1000
    run=run,
    encode_latents=encode_latents,
    decode_latents=decode_latents,
    encode_prompt=encode_prompt,
    collate=stack_text,
    text_shapes=words_of("encoder_hidden_states", "joint_attention_dim", LENGTH),
    base_shift=base_shift,
    lora_targets=(  # as published
        "transformer_blocks.*.ff.linear_in",
        "transformer_blocks.*.ff.linear_out",
        "transformer_blocks.*.ff_context.linear_in",
        "transformer_blocks.*.ff_context.linear_out",
        "time_guidance_embed.timestep_embedder.linear_1",
        "time_guidance_embed.timestep_embedder.linear_2",
        "single_transformer_blocks.*.attn.to_out",
    ),
    checkpoints=(
        "black-forest-labs/FLUX.2-dev",
        "black-forest-labs/FLUX.2-klein-base-4B",
        "black-forest-labs/FLUX.2-klein-base-9B",
    ),
    tier="free",
    sizes=Geometry(vae_factor=8, channels=32, patch=2),
    references=ReferencePictures(least_side=64, most_aspect=8, most_pixels=1024**2),
)
