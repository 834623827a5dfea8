"""Anima: the transformer of Cosmos-Predict2, told other words, on the straight path.

Its text conditioner is a network between the text encoder and the transformer: the words of T5, as
Qwen3 understands them. It sees the prompt alone, so what it makes is the embedding that is kept.
The text is not masked: behind the words stand zeros, and the model attends to them. diffusers
drives it with modular blocks alone.
B images, L text tokens, C channels.
"""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from asymlift.families.base import Geometry, Text, plain_shift, setting
from asymlift.families.cosmos import COSMOS
from asymlift.families.text import Sample, padded_text

WORDS = "encoder_hidden_states"
LENGTH = 512  # words of the longest prompt; the conditioner fills up any shorter one


@torch.no_grad()
def encode_prompt(
    pipeline: Any, prompts: Sequence[str], max_length: int | None = None
) -> list[dict[str, Tensor]]:
    """Embed each prompt, (L, width), the conditioner's zeros behind it included."""
    length = LENGTH if max_length is None else max_length
    block, net = pipeline.blocks.sub_blocks["text_encoder"], pipeline.text_conditioner
    samples = []
    for prompt in prompts:
        read = block.encode_prompt(
            components=pipeline,
            prompt=prompt,
            prepare_unconditional_embeds=False,
            max_sequence_length=length,
            device=net.device,
        )
        (words,) = net(  # no masks: a prompt alone has no padding, and the empty one only zeros
            source_hidden_states=read["qwen_prompt_embeds"].to(net.dtype),
            target_input_ids=read["t5_input_ids"],
        )
        samples.append({WORDS: words.clone()})
    return samples


def collate(samples: Sequence[Sample]) -> Text:
    """Fill up to the longest with zeros, as the pipeline does in a batch."""
    return {WORDS: padded_text(WORDS, "written")(samples)[WORDS]}


ANIMA = replace(
    COSMOS,
    name="anima",
    pipelines=("AnimaModularPipeline",),
    encode_prompt=encode_prompt,
    collate=collate,
    text_shapes=lambda config, length: {
        WORDS: (max(length or 0, LENGTH), setting(config, "text_embed_dim"))
    },
    base_shift=plain_shift,
    checkpoints=("circlestone-labs/Anima-Base-v1.0-Diffusers",),
    sizes=Geometry(vae_factor=8, channels=16, patch=2),
)
