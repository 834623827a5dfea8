"""FLUX.3 (not step-distilled): diffusers Flux3Transformer2DModel, packed 2x2 latent patches.

diffusers drives it with modular blocks alone. The rows and columns of a picture count by halves.
Text is padded to a multiple of 80 words, which the model attends to and cannot be told to ignore:
samples run one after the other, as many passes on every rank. Reference pictures have a map and
blocks of their own, which stay as they are.
B images, N = h w tokens, L text tokens (differing), C channels.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from asymlift.errors import BadData
from asymlift.families.autoencoder_flux2 import decode_latents, encode_latents, vae_sizes
from asymlift.families.base import Config, Family, Geometry, Text, plain_shift
from asymlift.families.packing import PATCH, grid_ids, grid_of, packed
from asymlift.families.text import at_most, ragged_text, words_of
from asymlift.maths.patches import image_to_tokens, tokens_to_image

IDS_PER_TOKEN = 0.5  # of rows and columns, `image_rope_scale` of the pipeline's blocks
LENGTH = 8192  # words of the longest prompt


def geometry(transformer: Config, vae: Config) -> Geometry:
    """Read the sizes off the two configs."""
    if transformer.get("flow_map"):
        raise BadData(
            "flux3: this transformer is a flow map, told two times, and cannot be lifted; "
            "take the model that it was distilled from"
        )
    return packed(vae_sizes)(transformer, vae)


def run(net: Any, latent: Tensor, time: Tensor, text: Text) -> Tensor:
    """One forward pass per sample. latent (B, C, 2h, 2w), time (B,) -> raw output, same shape."""
    tokens = image_to_tokens(latent, PATCH)
    places = IDS_PER_TOKEN * grid_ids(latent, axes=4)
    out = []
    for picture, words, t in zip(tokens, text["encoder_hidden_states"], time, strict=True):
        line = torch.zeros(len(words), 4, device=latent.device)
        line[:, 3] = torch.arange(len(words), device=latent.device)
        out += net(
            hidden_states=picture[None],
            encoder_hidden_states=words[None],
            timestep=t[None],
            img_ids=places,
            txt_ids=line,
            return_dict=False,
        )
    return tokens_to_image(torch.cat(out), PATCH, grid_of(latent))


@torch.no_grad()
def encode_prompt(
    pipeline: Any, prompts: Sequence[str], max_length: int | None = None
) -> list[dict[str, Tensor]]:
    """Embed each prompt as it is written, (L, width), with the pipeline's own block."""
    encoder = pipeline.blocks.sub_blocks["text_encoder"].init_pipeline()
    encoder.update_components(text_encoder=pipeline.text_encoder, tokenizer=pipeline.tokenizer)
    return [
        {
            "encoder_hidden_states": encoder(prompt=prompt, **at_most(max_length))
            .prompt_embeds[0]
            .clone()
        }
        for prompt in prompts
    ]


FLUX3 = Family(
    name="flux3",
    transformer="Flux3Transformer2DModel",
    pipelines=("Flux3ModularPipeline",),
    first="x_embedders.image",
    last="proj_out",
    final_norm="norm_out",
    order_in="c p q",
    order_out="c p q",
    sign=+1,
    geometry=geometry,
    channels=lambda c: {"in_channels": PATCH**2 * c},
    time=lambda tau, num_tokens: tau,  # the class multiplies by 1000
    run=run,
    encode_latents=encode_latents,
    decode_latents=decode_latents,
    encode_prompt=encode_prompt,
    collate=ragged_text,
    text_shapes=words_of("encoder_hidden_states", "joint_attention_dim", LENGTH),
    base_shift=plain_shift,
    lora_targets=(
        "mode_blocks.image.*.ff.linear_*",
        "mode_blocks.image.*.attn.to_out.0",
        "txt_mode_blocks.*.ff.linear_*",
        "txt_mode_blocks.*.attn.to_out.0",
        "single_transformer_blocks.*.ff.linear_*",
        "single_transformer_blocks.*.attn.to_out.0",
        "timestep_embedder.linear_*",
    ),
    checkpoints=(),
    tier="easy",
    sizes=Geometry(vae_factor=8, channels=32, patch=2),
    idle=("prompt_upsampler", "prompt_upsampler_processor"),  # it writes longer prompts
    own_scheduler={"shift": 6.93},
    heavy_text="8 layers of Qwen3-VL: 41 KB a word, and its prompts have hundreds",
    references="they have a map and blocks of their own in it, which stay as they are",
)
