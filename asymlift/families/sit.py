"""SiT: the classes of DiT under a flow, diffusers DiTTransformer2DModel, told labels for text.

Time runs from noise, 0, to the picture, 1, and is not multiplied by 1000. diffusers has no
pipeline of SiT's own: DiTPipeline runs it with a flow scheduler that counts the same way. Pictures
are square, since the class unpatches by the root of the number of tokens. A prompt is the number
of a class, or its name where model_index.json has `id2label`; the empty one is no class.
B images, C channels, q the latent patch.
"""

from collections.abc import Mapping, Sequence
from difflib import get_close_matches
from typing import Any

import torch
from torch import Tensor

from asymlift.errors import BadData
from asymlift.families.autoencoder_kl import decode_scaled, encode_scaled, vae_sizes
from asymlift.families.base import (
    Config,
    Family,
    Geometry,
    Grid,
    Text,
    check_grid,
    own_patches,
    plain_shift,
)
from asymlift.families.packing import grid_of
from asymlift.families.text import stack_text, stacked

NO_CLASS = -1  # the empty prompt; the class has a number for it, one after its last


def why_not_grid(config: Config, grid: Grid) -> str | None:
    """Tell what is no square: the class would fold its tokens into another picture."""
    return None if grid[0] == grid[1] else "its class draws squares only"


def run(net: Any, latent: Tensor, time: Tensor, text: Text) -> Tensor:
    """One forward pass. latent (B, C, h q, h q), time (B,) -> raw output, same shape."""
    q = net.config.patch_size
    grid = grid_of(latent, q)
    check_grid("sit", grid, why_not_grid(net.config, grid))
    labels = stacked(text, "class_labels")
    for block in net.transformer_blocks:  # each would drop labels by itself while training
        block.norm1.emb.class_embedder.eval()
    labels = torch.where(labels < 0, net.config.num_embeds_ada_norm, labels).long()
    out: Tensor = net(latent, timestep=time, class_labels=labels, return_dict=False)[0]
    return out[:, : latent.shape[1]]  # a learned variance comes after, which a flow does not use


def encode_prompt(
    pipeline: Any, prompts: Sequence[str], max_length: int | None = None
) -> list[dict[str, Tensor]]:
    """Turn each prompt into the number of its class, ()."""
    names: dict[str, int] = pipeline.labels
    if not names:
        raise BadData(
            "sit: model_index.json does not say what classes there are; add them, "
            '`"id2label": {"0": "tench, Tinca tinca", "1": "goldfish", ...}`'
        )
    return [{"class_labels": torch.tensor(class_of(prompt, names))} for prompt in prompts]


def class_of(prompt: str, names: Mapping[str, int]) -> int:
    """Return the number of a class, from itself or from its name."""
    prompt = prompt.strip()
    if not prompt:
        return NO_CLASS
    if prompt in names:
        return names[prompt]
    most = max(names.values())
    if prompt.isdecimal() and int(prompt) <= most:
        return int(prompt)
    close = get_close_matches(prompt, names, n=1)
    hint = f" (did you mean {close[0]!r}?)" if close else ""
    raise BadData(
        f"sit: no class {prompt!r}{hint}; a caption is a number, 0 to {most}, or a name of "
        "`id2label` in model_index.json"
    )


SIT = Family(
    name="sit",
    transformer="DiTTransformer2DModel",
    pipelines=("DiTPipeline",),
    first="pos_embed.proj",
    last="proj_out_2",
    final_norm="proj_out_1",
    order_in="c p q",
    order_out="p q c",
    sign=-1,
    geometry=own_patches(vae_sizes),
    channels=lambda c: {"in_channels": c, "out_channels": c},
    time=lambda tau, num_tokens: 1 - tau,
    run=run,
    encode_latents=encode_scaled,
    decode_latents=decode_scaled,
    encode_prompt=encode_prompt,
    collate=stack_text,
    text_shapes=lambda config, length: {"class_labels": ()},
    base_shift=plain_shift,
    lora_targets=(
        "transformer_blocks.*.ff.net.0.proj",
        "transformer_blocks.*.ff.net.2",
        "transformer_blocks.*.attn1.to_out.0",
        "transformer_blocks.*.norm1.emb.timestep_embedder.linear_*",
    ),
    checkpoints=(),  # its authors' are no diffusers folders, others' are of classes of their own
    tier="easy",
    has_text_encoder=False,
    why_not_grid=why_not_grid,
    prompts=("", "0"),
    sizes=Geometry(vae_factor=8, channels=4, patch=2),
    unproven={
        "pipeline": "diffusers has none for SiT; DiT's, over a flow, says nothing of time and sign",
        "sampling": "DiTPipeline draws its noise itself, and decodes whatever it has made",
    },
)
