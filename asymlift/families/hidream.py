"""HiDream-I1: diffusers HiDreamImageTransformer2DModel, which patches by itself.

The class fills a picture that is no square up with empty tokens, to the most that it knows, and
sees them. In training it answers in another form, and out of training its experts let no gradient
through; here they always do. Llama is not part of the published folders.
B images, L text tokens, K layers of Llama, C channels, q the latent patch.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from asymlift.errors import Unavailable
from asymlift.families.autoencoder_kl import decode_latents, encode_latents, vae_sizes
from asymlift.families.base import (
    Config,
    Family,
    Geometry,
    Grid,
    Text,
    check_grid,
    interpolated_shift,
    own_patches,
    setting,
)
from asymlift.families.packing import grid_of
from asymlift.families.text import at_most, stack_text, stacked

LENGTH = 128  # words that the pipeline pads a prompt to
T5, LLAMA, SUMMARY = "encoder_hidden_states_t5", "encoder_hidden_states_llama3", "pooled_embeds"


def why_not_grid(config: Config, grid: Grid) -> str | None:
    """Tell whether an oblong picture has more tokens than it would be filled up to."""
    height, width = setting(config, "max_resolution")  # in latent cells
    most = height * width // setting(config, "patch_size") ** 2
    if grid[0] == grid[1] or grid[0] * grid[1] <= most:
        return None
    return f"this model knows {most} tokens of one that is no square"


def run(net: Any, latent: Tensor, time: Tensor, text: Text) -> Tensor:
    """One forward pass. latent (B, C, h q, w q), time (B,) -> raw output, same shape."""
    q = net.config.patch_size
    grid = grid_of(latent, q)
    check_grid("hidream", grid, why_not_grid(net.config, grid))
    layers = stacked(text, LLAMA)
    with _answering_pictures(net):
        out: Tensor = net(
            hidden_states=latent,
            timesteps=time,
            return_dict=False,
            **{**text, LLAMA: layers.transpose(0, 1)},  # (K, B, L, width)
        )[0]
    return out


@contextmanager
def _answering_pictures(net: Any) -> Iterator[None]:
    """The whole as if out of training, the experts as if in it, whatever was asked for."""
    for layer in net.modules():
        if hasattr(layer, "moe_infer"):
            layer.training, layer._force_inference_output = True, False
    asked, net.training = net.training, False
    try:
        yield
    finally:
        net.training = asked


@torch.no_grad()
def encode_prompt(
    pipeline: Any, prompts: Sequence[str], max_length: int | None = None
) -> list[dict[str, Tensor]]:
    """Embed each prompt with T5, (L, width), Llama, (K, L, width), and both CLIPs, (width,)."""
    if pipeline.text_encoder_4 is None:
        raise Unavailable(
            "hidream: this folder has no Llama (text_encoder_4 and tokenizer_4); make a pipeline "
            "with Llama 3.1 8B Instruct, and save it with `save_pretrained`"
        )
    words, _, layers, _, summaries, _ = pipeline.encode_prompt(
        prompt=list(prompts), do_classifier_free_guidance=False, **at_most(max_length)
    )
    return [
        {T5: words[i].clone(), LLAMA: layers[:, i].clone(), SUMMARY: summaries[i].clone()}
        for i in range(len(prompts))
    ]


def text_shapes(config: Config, length: int | None) -> dict[str, tuple[int, ...]]:
    of_t5, of_llama = setting(config, "caption_channels")
    num_layers = 1 + max(setting(config, "llama_layers"))
    return {
        T5: (length or LENGTH, of_t5),
        LLAMA: (num_layers, length or LENGTH, of_llama),
        SUMMARY: (setting(config, "text_emb_dim"),),
    }


HIDREAM = Family(
    name="hidream",
    transformer="HiDreamImageTransformer2DModel",
    pipelines=("HiDreamImagePipeline",),
    first="x_embedder.proj",
    last="final_layer.linear",
    final_norm="final_layer.adaLN_modulation",  # the norm itself has no weights
    order_in="p q c",
    order_out="p q c",
    sign=-1,
    geometry=own_patches(vae_sizes),
    channels=lambda c: {"in_channels": c, "out_channels": c},
    time=lambda tau, num_tokens: 1000 * tau,
    run=run,
    encode_latents=encode_latents,
    decode_latents=decode_latents,
    encode_prompt=encode_prompt,
    collate=stack_text,
    text_shapes=text_shapes,
    base_shift=interpolated_shift,
    lora_targets=(  # of the experts, the one that all tokens pass
        "*_stream_blocks.*.block.ff_i.shared_experts.w*",
        "double_stream_blocks.*.block.ff_t.w*",
        "*_stream_blocks.*.block.attn1.to_out",
        "t_embedder.timestep_embedder.linear_*",
    ),
    checkpoints=("HiDream-ai/HiDream-I1-Full",),
    tier="easy",
    heavy_text="thirty-two layers of Llama, 35 MB for 128 words",
    why_not_grid=why_not_grid,
    sizes=Geometry(vae_factor=8, channels=16, patch=2),
)
