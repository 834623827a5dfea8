"""SANA and SANA 1.5: diffusers SanaTransformer2DModel, a cell of a 32 times smaller map.

Its MLPs are convolutions, and what modulates the last map's input is a bare table of the network,
so there is no final norm to train. Prompts follow an instruction, but the empty one.
B images, L text tokens (differing), C channels, q the latent patch.
"""

import inspect
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from asymlift.errors import BadData
from asymlift.families.autoencoder_dc import decode_latents, encode_latents, vae_sizes
from asymlift.families.base import Config, Family, Geometry, own_patches, plain_shift, run_map
from asymlift.families.text import at_most, padded_text, words_of

LENGTH = 300  # words of the longest prompt


def geometry(transformer: Config, vae: Config) -> Geometry:
    """Read the sizes off the two configs."""
    if transformer.get("guidance_embeds", False):
        raise BadData("sana: this is SANA-Sprint, whose time is an angle; take SANA or SANA 1.5")
    return own_patches(vae_sizes)(transformer, vae)


@torch.no_grad()
def encode_prompt(
    pipeline: Any, prompts: Sequence[str], max_length: int | None = None
) -> list[dict[str, Tensor]]:
    """Embed each prompt, (L, width), without padding, so L differs.

    The pipeline writes its instruction before a prompt, but not before a negative one, which
    the empty prompt is.
    """
    call = inspect.signature(type(pipeline).__call__).parameters
    instruction = call["complex_human_instruction"].default
    samples = []
    for prompt in prompts:
        words, mask, _, _ = pipeline.encode_prompt(
            prompt=[prompt],
            do_classifier_free_guidance=False,
            complex_human_instruction=instruction if prompt else None,
            **at_most(max_length),
        )
        samples.append({"encoder_hidden_states": words[0][mask[0].bool()].clone()})
    return samples


def base_shift(scheduler: Config, num_tokens: int) -> float:
    """Return the pipeline's time shift; the published scheduler has a name of its own for it."""
    if "flow_shift" in scheduler:
        return float(scheduler["flow_shift"])
    return plain_shift(scheduler, num_tokens)


SANA = Family(
    name="sana",
    transformer="SanaTransformer2DModel",
    pipelines=("SanaPipeline",),
    first="patch_embed.proj",  # a convolution
    last="proj_out",
    final_norm=None,
    order_in="c p q",  # of a convolution, so it cannot be otherwise
    order_out="p q c",
    sign=+1,
    geometry=geometry,
    channels=lambda c: {"in_channels": c, "out_channels": c},
    time=lambda tau, num_tokens: 1000 * tau,
    run=run_map,
    encode_latents=encode_latents,
    decode_latents=decode_latents,
    encode_prompt=encode_prompt,
    collate=padded_text("encoder_hidden_states", "encoder_attention_mask"),
    text_shapes=words_of("encoder_hidden_states", "caption_channels", LENGTH),
    base_shift=base_shift,
    lora_targets=(
        "transformer_blocks.*.attn*.to_*",  # all of attention, as no MLP is linear
        "time_embed.emb.timestep_embedder.linear_*",
    ),
    checkpoints=(
        "Efficient-Large-Model/Sana_1600M_1024px_BF16_diffusers",
        "Efficient-Large-Model/SANA1.5_1.6B_1024px_diffusers",
        "Efficient-Large-Model/SANA1.5_4.8B_1024px_diffusers",
    ),
    sizes=Geometry(vae_factor=32, channels=32, patch=1),
    tier="easy",
)
