"""OmniGen: diffusers OmniGenTransformer2DModel, a language model that reads the prompt itself.

Time runs from noise, 0, to the picture, 1, and is not multiplied by 1000. The sequence is the
prompt's tokens, one of time, and the picture's; the class counts every sample's positions as those
of the first, so prompts are padded on the left, where only distances matter. A second map, which
reads pictures that come with a prompt, is lifted but not used: they take places among the prompt's
tokens.
B images, L text tokens, C channels, q the latent patch, N tokens of a picture.
"""

import math
from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from asymlift.families.autoencoder_kl import decode_scaled, encode_scaled, vae_sizes
from asymlift.families.base import Family, Geometry, Text, own_patches, plain_shift
from asymlift.families.text import padded_text, stacked

LENGTH = 512  # tokens that a prompt is taken to have at most; nothing cuts it


def run(net: Any, latent: Tensor, time: Tensor, text: Text) -> Tensor:
    """One forward pass. latent (B, C, h q, w q), time (B,) -> raw output, same shape."""
    ids, written = stacked(text, "input_ids"), stacked(text, "written")
    num = latent.shape[-2] * latent.shape[-1] // net.config.patch_size**2
    mask = attention_mask(written.bool(), num)
    if "forward" not in vars(net.rope):
        net.rope.forward = partial(rotation, net.rope)
    out: Tensor = net(
        hidden_states=latent,
        timestep=time,
        input_ids=ids.long(),
        input_img_latents=[],
        input_image_sizes={},
        attention_mask=mask.to(latent.dtype),
        position_ids=torch.arange(mask.shape[-1], device=latent.device).unsqueeze(0),
        return_dict=False,
    )[0]
    return out


def attention_mask(written: Tensor, num: int) -> Tensor:
    """(B, L) -> (B, L + 1 + N, ...): words and time see what came before, the picture sees all."""
    words = written.shape[1]
    length = words + 1 + num
    sees = torch.ones(length, length, dtype=torch.bool, device=written.device).tril()
    sees[words + 1 :] = True
    there = torch.nn.functional.pad(written, (0, 1 + num), value=True)
    seen = sees & there.unsqueeze(1)
    return seen | ~there.unsqueeze(2)  # padding sees anything: a row of nothing would be NaN


def rotation(rope: Any, hidden_states: Tensor, position_ids: Tensor) -> tuple[Tensor, Tensor]:
    """As the class has it, which asks the device how many positions there are: the shape says it.

    position_ids (1, S) are 0, 1, 2, ...; cosines and sines are (S, width of a head).
    """
    length, usual = position_ids.shape[-1], rope.original_max_position_embeddings
    factors = torch.tensor(
        rope.long_factor if length > usual else rope.short_factor, device=position_ids.device
    )
    powers = torch.arange(0, rope.dim, 2, device=position_ids.device) / rope.dim
    with torch.autocast(position_ids.device.type, enabled=False):
        angles = position_ids[0].float().outer(1 / (factors * rope.base**powers))
        angles = torch.cat([angles, angles], dim=-1)
    longer = max(rope.max_position_embeddings / usual, 1.0)
    scale = math.sqrt(1 + math.log(longer) / math.log(usual))
    return angles.cos() * scale, angles.sin() * scale


def encode_prompt(
    pipeline: Any, prompts: Sequence[str], max_length: int | None = None
) -> list[dict[str, Tensor]]:
    """Turn each prompt, inside the pipeline's instruction, into tokens, (L,); none is cut off."""
    ids = [
        pipeline.multimodal_processor.process_multi_modal_prompt(one, None)["input_ids"]
        for one in prompts
    ]
    return [{"input_ids": torch.tensor(one)} for one in ids]


OMNIGEN = Family(
    name="omnigen",
    transformer="OmniGenTransformer2DModel",
    pipelines=("OmniGenPipeline",),
    first="patch_embedding.output_image_proj",
    last="proj_out",
    final_norm="norm_out",
    order_in="c p q",
    order_out="p q c",
    sign=-1,
    geometry=own_patches(vae_sizes),
    channels=lambda c: {"in_channels": c},
    time=lambda tau, num_tokens: 1 - tau,
    run=run,
    encode_latents=encode_scaled,
    decode_latents=decode_scaled,
    encode_prompt=encode_prompt,
    collate=padded_text("input_ids", "written", side="left"),
    text_shapes=lambda config, length: {"input_ids": (length or LENGTH,)},
    base_shift=plain_shift,
    lora_targets=(
        "layers.*.mlp.*",  # gate_up_proj, down_proj
        "layers.*.self_attn.to_out.0",
        "time_token.linear_*",
        "t_embedder.linear_*",
    ),
    checkpoints=("Shitao/OmniGen-v1-diffusers",),
    tier="easy",
    also_first=("patch_embedding.input_image_proj",),
    has_text_encoder=False,
    sizes=Geometry(vae_factor=8, channels=4, patch=2),
    references=(
        "they stand inside its prompt, and its pipeline guides by a third pass without the words, "
        "neither of which asymlift does"
    ),
)
