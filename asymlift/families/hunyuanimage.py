"""HunyuanImage 2.1: diffusers HunyuanImageTransformer2DModel, a cell of a 32 times smaller map.

Words between quotation marks are embedded a second time, letter by letter, to be drawn. Time has
the network's own dtype.
B images, L text tokens (differing), G letters to draw (often none), C channels, q the latent patch.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from asymlift.errors import BadData
from asymlift.families.autoencoder_kl import decode_scaled, encode_scaled
from asymlift.families.base import (
    Config,
    Family,
    Geometry,
    Text,
    check_channels,
    plain_shift,
    setting,
)
from asymlift.families.targets import DOUBLE_BLOCKS, SINGLE_BLOCKS
from asymlift.families.text import Sample, padded_text, stacked

LENGTH, GLYPHS = 1000, 128  # words, and letters to draw, of the longest prompt
WORDS = "encoder_hidden_states"
TEXT = (WORDS, "encoder_attention_mask", f"{WORDS}_2", "encoder_attention_mask_2")


def geometry(transformer: Config, vae: Config) -> Geometry:
    """Read the sizes off the two configs."""
    if transformer.get("use_meanflow", False):
        raise BadData(
            "hunyuanimage: this is the distilled model, which is told two times and leaps from "
            "one to the other; only the base model's velocity can be lifted"
        )
    if setting(transformer, "text_embed_2_dim") is None:
        raise BadData("hunyuanimage: this model reads no letters to draw; take HunyuanImage 2.1")
    q = setting(transformer, "patch_size")[0]
    sizes = Geometry(setting(vae, "spatial_compression_ratio"), setting(vae, "latent_channels"), q)
    return check_channels(sizes, setting(transformer, "in_channels"))


def run(net: Any, latent: Tensor, time: Tensor, text: Text) -> Tensor:
    """One forward pass. latent (B, C, h q, w q), time (B,) -> raw output, same shape."""
    words, mask, glyphs, drawn = (stacked(text, key) for key in TEXT)
    with _glyphs_after_words(net, glyphs, words.shape[1]):
        out: Tensor = net(
            hidden_states=latent,
            timestep=time.to(latent.dtype),
            encoder_hidden_states=words,
            encoder_attention_mask=torch.cat([mask, drawn], dim=1),
            return_dict=False,
        )[0]
    return out


@contextmanager
def _glyphs_after_words(net: Any, glyphs: Tensor, num_words: int) -> Iterator[None]:
    """Inside, embedded words are followed by embedded glyphs, however many of both are padding.

    The class itself sorts padding to the end, sample by sample: a GPU has to be asked how much
    there is, and shapes that only data tell cannot be planned. Attention knows no places of text.
    """

    def words_alone(module: Any, given: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        words, time, mask = given
        return words, time, mask[:, :num_words]

    def and_glyphs(module: Any, given: tuple[Tensor, ...], out: Tensor) -> Tensor:
        own = net.context_embedder_2.norm.weight.dtype  # its norm takes no other
        return torch.cat([out, net.context_embedder_2(glyphs.to(own))], dim=1)

    embed = net.context_embedder
    hooks = [embed.register_forward_pre_hook(words_alone), embed.register_forward_hook(and_glyphs)]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


@torch.no_grad()
def encode_prompt(
    pipeline: Any, prompts: Sequence[str], max_length: int | None = None
) -> list[dict[str, Tensor]]:
    """Embed each prompt, (L, width), and what it wants written, (G, width), without padding.

    The encoder of words looks back only, so the first of them stand alone.
    """
    words, mask, glyphs, glyph_mask = pipeline.encode_prompt(
        prompt=list(prompts), batch_size=len(prompts)
    )
    return [
        {
            WORDS: one[written.bool()][:max_length].clone(),
            f"{WORDS}_2": drawn[used.bool()].clone(),
        }
        for one, written, drawn, used in zip(words, mask, glyphs, glyph_mask, strict=True)
    ]


def collate(samples: Sequence[Sample]) -> Text:
    """Pad words and letters to the longest, each with its mask."""
    text: Text = {}
    for suffix in ("", "_2"):
        key = f"{WORDS}{suffix}"
        pad = padded_text(key, f"encoder_attention_mask{suffix}")
        text |= pad([{key: sample[key]} for sample in samples])
    return text


HUNYUANIMAGE = Family(
    name="hunyuanimage",
    transformer="HunyuanImageTransformer2DModel",
    pipelines=("HunyuanImagePipeline",),
    first="x_embedder.proj",  # a convolution
    last="proj_out",
    final_norm="norm_out",
    order_in="c p q",
    order_out="c p q",
    sign=+1,
    geometry=geometry,
    channels=lambda c: {"in_channels": c, "out_channels": c},
    time=lambda tau, num_tokens: 1000 * tau,
    run=run,
    encode_latents=encode_scaled,
    decode_latents=decode_scaled,
    encode_prompt=encode_prompt,
    collate=collate,
    text_shapes=lambda config, length: {
        WORDS: (length or LENGTH, setting(config, "text_embed_dim")),
        f"{WORDS}_2": (GLYPHS, setting(config, "text_embed_2_dim")),
    },
    base_shift=plain_shift,
    lora_targets=(*DOUBLE_BLOCKS, *SINGLE_BLOCKS, "time_guidance_embed.timestep_embedder.linear_*"),
    checkpoints=("hunyuanvideo-community/HunyuanImage-2.1-Diffusers",),
    sizes=Geometry(vae_factor=32, channels=64, patch=1),
    tier="free",
)
