"""Kandinsky 5 T2I: diffusers Kandinsky5Transformer3DModel, whose pictures are films of one frame.

Channels come last. The model has no mask for text, so samples run one after the other, as many
passes on every rank. Attention is rounded to bf16 by the class itself, and times are float32.
B images, L text tokens (differing), C channels, q the latent patch.
"""

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor

from asymlift.errors import BadData
from asymlift.families.autoencoder_kl import decode_scaled, encode_scaled, vae_sizes
from asymlift.families.base import (
    Config,
    Family,
    Geometry,
    Text,
    check_channels,
    plain_shift,
    setting,
)
from asymlift.families.packing import grid_of
from asymlift.families.text import Sample, at_most, ragged_text, stack_text

LENGTH = 512  # words of the longest prompt
WORDS, SUMMARY = "encoder_hidden_states", "pooled_projections"


def geometry(transformer: Config, vae: Config) -> Geometry:
    """Read the sizes off the two configs."""
    if transformer.get("visual_cond", False):
        raise BadData("kandinsky5: this model reads a first frame too; only T2I can be lifted")
    frames, q, _ = setting(transformer, "patch_size")
    if frames != 1:
        raise BadData(f"kandinsky5: a token is {frames} frames, but a picture is one")
    sizes = Geometry(*vae_sizes(vae), q)
    return check_channels(sizes, setting(transformer, "in_visual_dim"))


def run(net: Any, latent: Tensor, time: Tensor, text: Text) -> Tensor:
    """One forward pass per sample. latent (B, C, h q, w q), time (B,) -> raw output, same shape."""
    q, device = net.patch_size[-1], latent.device
    sides = (1, *grid_of(latent, q))
    films = latent.permute(0, 2, 3, 1)[:, None, None]  # (B, 1, one frame, h q, w q, C)
    with _times_in_own_dtype(net):
        out = [
            net(
                hidden_states=film,
                encoder_hidden_states=words[None],
                pooled_projections=summary[None],
                timestep=t[None],
                visual_rope_pos=[torch.arange(side, device=device) for side in sides],
                text_rope_pos=torch.arange(len(words), device=device),
                return_dict=False,
            )
            for film, words, summary, t in zip(films, text[WORDS], text[SUMMARY], time, strict=True)
        ]
    return torch.cat(out).squeeze(1).permute(0, 3, 1, 2)


@contextmanager
def _times_in_own_dtype(net: Any) -> Iterator[None]:
    """The class hands float32 to the first layer for times, whatever that layer's dtype."""

    def cast(layer: Any, given: tuple[Tensor]) -> tuple[Tensor]:
        return (given[0].to(layer.weight.dtype),)

    with ExitStack() as hooks:
        for name, layer in net.time_embeddings.named_modules():
            if name.endswith("in_layer"):
                hooks.callback(layer.register_forward_pre_hook(cast).remove)
        yield


@torch.no_grad()
def encode_prompt(
    pipeline: Any, prompts: Sequence[str], max_length: int | None = None
) -> list[dict[str, Tensor]]:
    """Embed each prompt with Qwen2.5-VL, (L, width), and CLIP, (width,), alone.

    In a batch the words would see the padding, which the pipeline does not hide.
    """
    samples = []
    for prompt in prompts:
        words, summary, _ = pipeline.encode_prompt(prompt=[prompt], **at_most(max_length))
        samples.append({WORDS: words[0].clone(), SUMMARY: summary[0].clone()})
    return samples


def collate(samples: Sequence[Sample]) -> Text:
    """Keep the words of each sample as they are, and stack the summaries."""
    words, summaries = ([{k: one[k]} for one in samples] for k in (WORDS, SUMMARY))
    return {**ragged_text(words), **stack_text(summaries)}


KANDINSKY5 = Family(
    name="kandinsky5",
    transformer="Kandinsky5Transformer3DModel",
    pipelines=("Kandinsky5T2IPipeline",),
    first="visual_embeddings.in_layer",
    last="out_layer.out_layer",
    final_norm="out_layer.modulation",  # the norm itself has no weights
    order_in="p q c",
    order_out="c p q",
    sign=+1,
    geometry=geometry,
    channels=lambda c: {"in_visual_dim": c, "out_visual_dim": c},
    time=lambda tau, num_tokens: 1000 * tau,
    run=run,
    encode_latents=encode_scaled,
    decode_latents=decode_scaled,
    encode_prompt=encode_prompt,
    collate=collate,
    text_shapes=lambda config, length: {
        WORDS: (length or LENGTH, setting(config, "in_text_dim")),
        SUMMARY: (setting(config, "in_text_dim2"),),
    },
    base_shift=plain_shift,
    lora_targets=(
        "*_transformer_blocks.*.feed_forward.*_layer",
        "*_transformer_blocks.*_attention.out_layer",
        "time_embeddings.*_layer",
    ),
    checkpoints=(
        "kandinskylab/Kandinsky-5.0-T2I-Lite-pretrain-Diffusers",
        "kandinskylab/Kandinsky-5.0-T2I-Lite-sft-Diffusers",
    ),
    last_reads=lambda read, text, n: read.flatten(1, -2),  # (1, frame, h, w, F)
    sizes=Geometry(vae_factor=8, channels=16, patch=2),
    tier="easy",
    needs={"ftfy": "asymlift[prompts]"},  # without it the pipeline reads prompts differently
)
