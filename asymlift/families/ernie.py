"""ERNIE-Image: diffusers ErnieImageTransformer2DModel, a map of packed 2x2 latent patches.

It has FLUX.2's VAE, normalised with an epsilon of the pipeline's own.
B images, L text tokens (differing), C channels.
"""

from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from asymlift.families.autoencoder_flux2 import PATCH, decode_latents, encode_latents, vae_sizes
from asymlift.families.base import Family, Geometry, Text, plain_shift
from asymlift.families.packing import packed
from asymlift.families.text import Sample, padded_text, stacked, words_of

LENGTH = 1024  # words of a long caption; the pipeline itself cuts nothing off
EPS = 1e-5  # the pipeline's, whatever the VAE's config says


def run(net: Any, latent: Tensor, time: Tensor, text: Text) -> Tensor:
    """One forward pass. latent (B, C, 2h, 2w), time (B,) -> raw output, same shape."""
    packed = functional.pixel_unshuffle(latent, PATCH)  # (B, 4C, h, w)
    out: Tensor = net(hidden_states=packed, timestep=time, return_dict=False, **text)[0]
    return functional.pixel_shuffle(out, PATCH)


@torch.no_grad()
def encode_prompt(
    pipeline: Any, prompts: Sequence[str], max_length: int | None = None
) -> list[dict[str, Tensor]]:
    """Embed each prompt, (L, width). The encoder looks back only, so the first words stand alone.

    The prompt is not rewritten by the pipeline's own language model.
    """
    words = pipeline.encode_prompt(list(prompts), pipeline._execution_device)
    return [{"text_bth": one[:max_length].clone()} for one in words]


def collate(samples: Sequence[Sample]) -> Text:
    """Pad to the longest prompt, and say how long each is."""
    text = padded_text("text_bth", "written")(samples)
    return {"text_bth": text["text_bth"], "text_lens": stacked(text, "written").sum(dim=1)}


ERNIE = Family(
    name="ernie",
    transformer="ErnieImageTransformer2DModel",
    pipelines=("ErnieImagePipeline",),
    first="x_embedder.proj",  # a convolution of one cell
    last="final_linear",
    final_norm="final_norm",
    order_in="c p q",
    order_out="c p q",
    sign=+1,
    geometry=packed(vae_sizes),
    channels=lambda c: {"in_channels": PATCH**2 * c, "out_channels": PATCH**2 * c},
    time=lambda tau, num_tokens: 1000 * tau,
    run=run,
    encode_latents=partial(encode_latents, eps=EPS),
    decode_latents=partial(decode_latents, eps=EPS),
    encode_prompt=encode_prompt,
    collate=collate,
    text_shapes=words_of("text_bth", "text_in_dim", LENGTH),
    base_shift=plain_shift,
    lora_targets=(
        "layers.*.mlp.*",  # gate_proj, up_proj, linear_fc2
        "layers.*.self_attention.to_out.0",
        "time_embedding.linear_*",
    ),
    checkpoints=("baidu/ERNIE-Image",),
    last_reads=lambda read, text, n: read[:n].transpose(0, 1),  # tokens first, then samples
    sizes=Geometry(vae_factor=8, channels=32, patch=2),
    tier="free",
)
