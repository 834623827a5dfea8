"""Cosmos-Predict2 Text2Image: diffusers CosmosTransformer3DModel, a video model of one frame.

A mask of padding comes as one more channel, always zero here; the lift copies its weights. The
text is not masked: behind the words the pipeline writes zeros, and the model attends to them. The
pipeline keeps its state divided by 1 - tau, so its levels are tau / (1 - tau), up to 80, but the
network sees the straight path. Pictures that asymlift draws do not go through NVIDIA's guardrail,
without which diffusers does not build the pipeline (`pip install cosmos_guardrail`).
B images, L text tokens, C channels.
"""

from typing import Any

from torch import Tensor

from asymlift.errors import BadData
from asymlift.families.autoencoder_frames import decode_latents, encode_latents, vae_sizes
from asymlift.families.base import (
    Config,
    Family,
    Geometry,
    Text,
    check_channels,
    plain_shift,
    setting,
)
from asymlift.families.text import encode_words, stack_text, words_of

PATCH = 2
LENGTH = 512  # words that the pipeline pads a prompt to
MOST, LEAST, RHO = 80.0, 0.002, 7.0  # of the pipeline's levels, and of the scheduler's Karras steps


def geometry(transformer: Config, vae: Config) -> Geometry:
    """Read the sizes off the two configs."""
    patch = list(setting(transformer, "patch_size"))
    if patch != [1, PATCH, PATCH]:
        raise BadData(f"cosmos: patch_size is {patch}, not {[1, PATCH, PATCH]}")
    return check_channels(Geometry(*vae_sizes(vae), PATCH), setting(transformer, "in_channels"))


def run(net: Any, latent: Tensor, time: Tensor, text: Text) -> Tensor:
    """One forward pass. latent (B, C, 2h, 2w), time (B,) -> raw output, same shape."""
    out: Tensor = net(
        hidden_states=latent.unsqueeze(2),  # one frame
        timestep=time,
        padding_mask=latent.new_zeros(1, 1, *latent.shape[-2:]),
        return_dict=False,
        **text,
    )[0]
    return out.squeeze(2)


def base_shift(scheduler: Config, num_tokens: int) -> float:
    """Return the shift that has the middle one of Karras' levels, which no shift has all of."""
    if not scheduler.get("use_karras_sigmas", False):
        return plain_shift(scheduler, num_tokens)
    ends = (scheduler.get("sigma_max") or MOST, scheduler.get("sigma_min") or LEAST)
    return float((sum(end ** (1 / RHO) for end in ends) / 2) ** RHO)


COSMOS = Family(
    name="cosmos",
    transformer="CosmosTransformer3DModel",
    pipelines=("Cosmos2TextToImagePipeline",),
    first="patch_embed.proj",
    last="proj_out",
    final_norm="norm_out",
    order_in="c p q",
    order_out="p q c",
    sign=+1,
    geometry=geometry,
    channels=lambda c: {"in_channels": c, "out_channels": c},
    time=lambda tau, num_tokens: tau,
    run=run,
    encode_latents=encode_latents,
    decode_latents=decode_latents,
    encode_prompt=encode_words,
    collate=stack_text,
    text_shapes=words_of("encoder_hidden_states", "text_embed_dim", LENGTH),
    base_shift=base_shift,
    lora_targets=(
        "transformer_blocks.*.ff.net.0.proj",
        "transformer_blocks.*.ff.net.2",
        "transformer_blocks.*.attn1.to_out.0",
        "transformer_blocks.*.attn2.to_out.0",
        "time_embed.t_embedder.linear_*",
    ),
    checkpoints=(
        "nvidia/Cosmos-Predict2-2B-Text2Image",
        "nvidia/Cosmos-Predict2-14B-Text2Image",
    ),
    tier="easy",
    sizes=Geometry(vae_factor=8, channels=16, patch=2),
)
