"""Z-Image: diffusers ZImageTransformer2DModel, which takes lists and counts time backwards.

B images, L text tokens (differing), C channels.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from asymlift.errors import BadData
from asymlift.families.autoencoder_kl import decode_latents, encode_latents, vae_sizes
from asymlift.families.base import (
    Config,
    Family,
    Geometry,
    Text,
    check_channels,
    interpolated_shift,
    setting,
)
from asymlift.families.text import at_most, ragged_text, words_of
from asymlift.maths.guidance import Renorm

LENGTH = 512  # words of the longest prompt
PATCH = 2  # part of the maps' paths, and the class's default


def geometry(transformer: Config, vae: Config) -> Geometry:
    """Read the sizes off the two configs; one model may hold maps for several patches."""
    patches, frames = (setting(transformer, f"all_{kind}patch_size") for kind in ("", "f_"))
    patches = list(zip(patches, frames, strict=True))
    if patches != [(PATCH, 1)]:
        raise BadData(f"zimage: patches (space, frames) are {patches}, not {[(PATCH, 1)]}")
    return check_channels(Geometry(*vae_sizes(vae), PATCH), setting(transformer, "in_channels"))


def run(net: Any, latent: Tensor, time: Tensor, text: Text) -> Tensor:
    """One forward pass. latent (B, C, 2h, 2w), time (B,) -> raw output, same shape."""
    pictures = list(latent.unsqueeze(2).unbind())  # each (C, 1, 2h, 2w): one frame
    out = net(pictures, time, list(text["cap_feats"]), return_dict=False)[0]
    return torch.stack(list(out)).squeeze(2)


@torch.no_grad()
def encode_prompt(
    pipeline: Any, prompts: Sequence[str], max_length: int | None = None
) -> list[dict[str, Tensor]]:
    """Embed each prompt, (L, width). The pipeline cuts the padding off, so L differs."""
    embeddings, _ = pipeline.encode_prompt(
        prompt=list(prompts), do_classifier_free_guidance=False, **at_most(max_length)
    )
    return [{"cap_feats": one.clone()} for one in embeddings]


ZIMAGE = Family(
    name="zimage",
    transformer="ZImageTransformer2DModel",
    pipelines=("ZImagePipeline",),
    first=f"all_x_embedder.{PATCH}-1",
    last=f"all_final_layer.{PATCH}-1.linear",
    final_norm=f"all_final_layer.{PATCH}-1.adaLN_modulation",  # the norm itself has no weights
    order_in="p q c",
    order_out="p q c",
    sign=-1,
    geometry=geometry,
    channels=lambda c: {"in_channels": c},
    time=lambda tau, num_tokens: 1 - tau,  # the class multiplies by 1000
    run=run,
    encode_latents=encode_latents,
    decode_latents=decode_latents,
    encode_prompt=encode_prompt,
    collate=ragged_text,
    text_shapes=words_of("cap_feats", "cap_feat_dim", LENGTH),
    base_shift=interpolated_shift,
    lora_targets=(
        "layers.*.feed_forward.w*",  # w1, w2, w3
        "noise_refiner.*.feed_forward.w*",
        "context_refiner.*.feed_forward.w*",
        "t_embedder.mlp.*",
        "layers.*.attention.to_out.0",
    ),
    checkpoints=("Tongyi-MAI/Z-Image",),
    tier="free",
    renorm=Renorm(of="pictures", only_shrinks=True),  # the pipeline's cfg_normalization=1.0
    sizes=Geometry(vae_factor=8, channels=16, patch=2),
)
