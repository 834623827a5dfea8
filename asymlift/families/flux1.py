"""FLUX.1 dev and schnell: diffusers FluxTransformer2DModel, packed 2x2 latent patches.

B images, N = h w tokens, L text tokens, C channels.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from asymlift.families.autoencoder_kl import decode_latents, encode_latents
from asymlift.families.base import (
    Config,
    Family,
    Geometry,
    Text,
    interpolated_shift,
    setting,
)
from asymlift.families.packing import PATCH, grid_ids, packed_geometry
from asymlift.families.text import stack_text
from asymlift.maths.patches import image_to_tokens, tokens_to_image

DISTILLED_GUIDANCE = 3.5  # the pipeline's default for dev, which is told its guidance scale
LENGTH = 512  # words that the pipeline pads a prompt to


def run(net: Any, latent: Tensor, time: Tensor, text: Text) -> Tensor:
    """One forward pass. latent (B, C, 2h, 2w), time (B,) -> raw output, same shape."""
    h, w = latent.shape[-2] // PATCH, latent.shape[-1] // PATCH
    words = text["encoder_hidden_states"]
    assert isinstance(words, Tensor)  # the model attends to its padding, so nothing is ragged
    guidance = text.get("guidance")
    if guidance is None and net.config.guidance_embeds:
        guidance = torch.full_like(time, DISTILLED_GUIDANCE)
    out: Tensor = net(
        hidden_states=image_to_tokens(latent, PATCH),
        encoder_hidden_states=words,
        pooled_projections=text["pooled_projections"],
        timestep=time,
        img_ids=grid_ids(h, w, device=latent.device),
        txt_ids=torch.zeros(words.shape[1], 3, device=latent.device),
        guidance=guidance,
        return_dict=False,
    )[0]
    return tokens_to_image(out, PATCH, (h, w))


@torch.no_grad()
def encode_prompt(
    pipeline: Any, prompts: Sequence[str], max_length: int | None = None
) -> list[dict[str, Tensor]]:
    """Embed each prompt with T5 (L, width) and CLIP's summary (width,)."""
    length = {} if max_length is None else {"max_sequence_length": max_length}
    words, pooled, _ = pipeline.encode_prompt(prompt=list(prompts), prompt_2=None, **length)
    return [
        {"encoder_hidden_states": one.clone(), "pooled_projections": summary.clone()}
        for one, summary in zip(words, pooled, strict=True)
    ]


def base_shift(scheduler: Config, num_tokens: int) -> float:
    """Return the pipeline's time shift: by resolution for dev, none for schnell."""
    return interpolated_shift(scheduler, num_tokens, max_shift=1.15)


FLUX1 = Family(
    name="flux1",
    transformer="FluxTransformer2DModel",
    pipelines=("FluxPipeline",),
    first="x_embedder",
    last="proj_out",
    final_norm="norm_out",
    order_in="c p q",
    order_out="c p q",
    sign=+1,
    geometry=packed_geometry("flux1"),
    channels=lambda c: {"in_channels": PATCH**2 * c, "out_channels": None},
    time=lambda tau, num_tokens: tau,  # the class multiplies by 1000
    run=run,
    encode_latents=encode_latents,
    decode_latents=decode_latents,
    encode_prompt=encode_prompt,
    collate=stack_text,
    text_shapes=lambda config, length: {
        "encoder_hidden_states": (length or LENGTH, setting(config, "joint_attention_dim")),
        "pooled_projections": (setting(config, "pooled_projection_dim"),),
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
        "time_text_embed.timestep_embedder.linear_*",
    ),
    checkpoints=("black-forest-labs/FLUX.1-dev", "black-forest-labs/FLUX.1-schnell"),
    tier="free",
    sizes=Geometry(vae_factor=8, channels=16, patch=2),
)
