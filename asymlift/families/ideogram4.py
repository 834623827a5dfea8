"""Ideogram 4: diffusers Ideogram4Transformer2DModel, words and 2x2 latent patches in one sequence.

It counts time backwards. Guidance goes against a second network, `unconditional_transformer`, which
sees no text: it is lifted too, but does not train. Previews and trained weights are guided against
the empty prompt, so drop some captions in training. The pipeline's guidance is the plain one, of 7
and in the last three of its 48 steps 3; ours is the same in all steps. The pipeline spaces its
levels by a logit-normal; of that we take the shift by resolution alone. What is published is in 8
or 4 bits: save it in bf16 first.
B images, N = h w tokens, L text tokens (differing, 0 of the second network), C channels.
"""

import math
from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from asymlift.families.autoencoder_flux2 import PATCH, decode_latents, encode_latents, vae_sizes
from asymlift.families.base import Config, Family, Geometry, Text, picture_last, plain_shift
from asymlift.families.packing import grid_ids, grid_of, packed
from asymlift.families.text import padded_text, stacked, words_of
from asymlift.maths.patches import Order, image_to_tokens, tokens_to_image

ORDER: Order = "p q c"  # of the tokens, and of the VAE's statistics too
LENGTH = 2048  # words of the longest prompt
PADDING, WORD, PICTURE = 0, 3, 2  # what a place of the sequence holds ...
NOTHING, SAMPLE = -1, 1  # ... and whom it sees: those of its kind
PICTURES_BEGIN = 65536  # the first position of a picture, on all three axes
UNSHIFTED = 1024  # tokens of a picture that is not shifted: 512 x 512 pixels


def run(net: Any, latent: Tensor, time: Tensor, text: Text) -> Tensor:
    """One forward pass. latent (B, C, 2h, 2w), time (B,) -> raw output, same shape."""
    h, w = grid_of(latent)
    words, written = stacked(text, "encoder_hidden_states"), stacked(text, "encoder_attention_mask")
    tokens, num_words = image_to_tokens(latent, PATCH, ORDER), words.shape[1]

    places = (written.cumsum(1) - 1).clamp(min=0)[..., None].expand(-1, -1, 3)
    grid = (grid_ids(latent).long() + PICTURES_BEGIN).expand(len(latent), -1, 3)
    pictures = torch.ones(tokens.shape[:2], dtype=torch.long, device=latent.device)
    out: Tensor = net(
        hidden_states=_behind(tokens.new_zeros(len(tokens), num_words, tokens.shape[2]), tokens),
        timestep=time.to(latent.dtype),
        encoder_hidden_states=_behind(
            words.to(net.llm_cond_proj.weight.dtype),
            words.new_zeros(len(tokens), h * w, words.shape[2]),
        ),
        position_ids=_behind(places, grid),
        segment_ids=_behind(torch.where(written, SAMPLE, NOTHING), SAMPLE * pictures),
        indicator=_behind(torch.where(written, WORD, PADDING), PICTURE * pictures),
        return_dict=False,
    )[0]
    return tokens_to_image(out[:, num_words:], PATCH, (h, w), ORDER)


def _behind(words: Tensor, picture: Tensor) -> Tensor:
    return torch.cat([words, picture.to(words.dtype)], dim=1)


@torch.no_grad()
def encode_prompt(
    pipeline: Any, prompts: Sequence[str], max_length: int | None = None
) -> list[dict[str, Tensor]]:
    """Embed each prompt alone, so without padding, (L, width).

    The pipeline refuses long ones; its encoder looks back only, so we can cut them.
    """
    samples = []
    for prompt in prompts:
        message = {"role": "user", "content": [{"type": "text", "text": prompt}]}
        asked = pipeline.tokenizer.apply_chat_template(
            [message], add_generation_prompt=True, tokenize=False
        )
        length = len(pipeline.tokenizer(asked, add_special_tokens=False)["input_ids"])
        words = pipeline.encode_prompt([prompt], 0, 0, length, pipeline.text_encoder.device)[0]
        dtype = pipeline.text_encoder.dtype  # the pipeline makes float32 of it
        samples.append({"encoder_hidden_states": words[0, : max_length or LENGTH].to(dtype)})
    return samples


def base_shift(scheduler: Config, num_tokens: int) -> float:
    """Return the scheduler's time shift, times the pipeline's own: by the side of the picture."""
    return plain_shift(scheduler, num_tokens) * math.sqrt(num_tokens / UNSHIFTED)


IDEOGRAM4 = Family(
    name="ideogram4",
    transformer="Ideogram4Transformer2DModel",
    pipelines=("Ideogram4Pipeline",),
    first="input_proj",
    last="final_layer.linear",
    final_norm="final_layer.adaln_modulation",  # the norm itself has no weights
    order_in=ORDER,
    order_out=ORDER,
    sign=-1,
    geometry=packed(vae_sizes),
    channels=lambda c: {"in_channels": PATCH**2 * c},
    time=lambda tau, num_tokens: 1 - tau,
    run=run,
    encode_latents=partial(encode_latents, order=ORDER),
    decode_latents=partial(decode_latents, order=ORDER),
    encode_prompt=encode_prompt,
    collate=padded_text("encoder_hidden_states", "encoder_attention_mask"),
    text_shapes=words_of("encoder_hidden_states", "llm_features_dim", LENGTH),
    base_shift=base_shift,
    lora_targets=(
        "layers.*.feed_forward.w*",  # w1, w2, w3
        "layers.*.attention.to_out.0",
        "t_embedding.mlp_*",
    ),
    checkpoints=("ideogram-ai/ideogram-4-fp8",),
    tier="easy",
    last_reads=picture_last,
    wordless="unconditional_transformer",
    heavy_text="thirteen layers of the text encoder, 0.1 MB a word",
    sizes=Geometry(vae_factor=8, channels=32, patch=2),
)
