"""Bria FIBO: diffusers BriaFiboTransformer2DModel, one latent cell a token.

Every block reads another layer of the text encoder; where there are more blocks than layers, the
last ones read the last layer. Prompts are JSON in the form that its authors' captioner writes.
B images, N = h w tokens, L text tokens (differing), K layers of the text encoder, C channels.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from asymlift.families.autoencoder_frames import decode_latents, encode_latents, vae_sizes
from asymlift.families.base import Family, Geometry, Text, interpolated_shift, setting
from asymlift.families.packing import grid_ids, packed
from asymlift.families.targets import DOUBLE_BLOCKS, SINGLE_BLOCKS
from asymlift.families.text import at_most, dtype_without_transformer, padded_text, stacked
from asymlift.maths.patches import image_to_tokens, tokens_to_image

PATCH = 1  # the pipeline's default, `do_patching=False`
LENGTH = 3000  # words of the longest prompt
LAYERS = 37  # of SmolLM3-3B, the embedding included


def run(net: Any, latent: Tensor, time: Tensor, text: Text) -> Tensor:
    """One forward pass. latent (B, C, h, w), time (B,) -> raw output, same shape."""
    h, w = latent.shape[-2:]
    states, written = stacked(text, "text_layers"), stacked(text, "text_mask")
    layers = list(states.unbind(2))  # K of (B, L, width)
    num_blocks = len(net.transformer_blocks) + len(net.single_transformer_blocks)
    repeated = [layers[-1]] * (num_blocks - len(layers))
    mask = torch.cat([written, written.new_ones(len(latent), h * w)], dim=1)[:, None, None]
    out: Tensor = net(
        hidden_states=image_to_tokens(latent, PATCH),
        encoder_hidden_states=torch.cat([layers[-1], layers[-2]], dim=-1),
        text_encoder_layers=(layers + repeated)[-num_blocks:],
        timestep=time,
        img_ids=grid_ids(latent, patch=PATCH),
        txt_ids=torch.zeros(states.shape[1], 3, device=latent.device),
        joint_attention_kwargs={"attention_mask": mask},
        return_dict=False,
    )[0]
    return tokens_to_image(out, PATCH, (h, w))


@torch.no_grad()
def encode_prompt(
    pipeline: Any, prompts: Sequence[str], max_length: int | None = None
) -> list[dict[str, Tensor]]:
    """Embed each prompt alone, (L, K, width): in a batch, an empty one would grow."""
    with dtype_without_transformer(pipeline):
        layers = [
            pipeline.encode_prompt(prompt=[prompt], guidance_scale=1, **at_most(max_length))[5]
            for prompt in prompts
        ]
    return [{"text_layers": torch.stack(one, dim=2)[0]} for one in layers]


FIBO = Family(
    name="fibo",
    transformer="BriaFiboTransformer2DModel",
    pipelines=("BriaFiboPipeline",),
    first="x_embedder",
    last="proj_out",
    final_norm="norm_out",
    order_in="c p q",
    order_out="c p q",
    sign=+1,
    geometry=packed(vae_sizes, PATCH),
    channels=lambda c: {"in_channels": c},
    time=lambda tau, num_tokens: 1000 * tau,
    run=run,
    encode_latents=encode_latents,
    decode_latents=decode_latents,
    encode_prompt=encode_prompt,
    collate=padded_text("text_layers", "text_mask"),
    text_shapes=lambda config, length: {
        "text_layers": (length or LENGTH, LAYERS, setting(config, "text_encoder_dim"))
    },
    base_shift=interpolated_shift,
    lora_targets=(*DOUBLE_BLOCKS, *SINGLE_BLOCKS, "time_embed.timestep_embedder.linear_*"),
    checkpoints=("briaai/FIBO",),
    tier="easy",
    sizes=Geometry(vae_factor=16, channels=48, patch=1),
    heavy_text="all 37 layers of SmolLM3: 150 KB a word, and its prompts have a thousand",
)
