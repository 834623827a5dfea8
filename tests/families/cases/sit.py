"""SiT, tiny: with a learned variance, as the published SiT-XL/2 has it."""

from typing import Any

import torch

from tests.families.case import CHANNELS, Case, flow_scheduler, given, kl_vae, same
from tests.stages.prepare.small_prepare import caption_of

CLASSES = ["a bee", "a cat", "a disc", *(caption_of(number) for number in range(10))]


def scheduler() -> Any:
    """A flow scheduler lacks what DiTPipeline asks for, and its own levels of one step are one."""
    made = flow_scheduler(invert_sigmas=True, num_train_timesteps=1)()
    take = made.set_timesteps
    made.set_timesteps = lambda steps: take(sigmas=torch.linspace(1, 1 / steps, steps).tolist())
    made.scale_model_input = lambda sample, time: sample
    return made


CASE = Case(
    transformer={
        "sample_size": 8,
        "in_channels": CHANNELS,
        "out_channels": 2 * CHANNELS,
        "num_layers": 2,
        "attention_head_dim": 16,
        "num_attention_heads": 2,
        "num_embeds_ada_norm": len(CLASSES),
    },
    vae=kl_vae(scaling_factor=0.18215),
    scheduler=scheduler,
    text_parts=dict,
    pipeline_parts={"id2label": {str(i): f"{name}, no. {i}" for i, name in enumerate(CLASSES)}},
    sample=lambda noise, i: {"class_labels": torch.tensor(3 + i)},
    read=lambda call: (
        call["hidden_states"][:, :CHANNELS],
        call["timestep"],
        given(call, ["class_labels"]),
    ),
    write=lambda image: torch.cat([image, image], dim=1),
    start=same,
    published=(),
    asked={"class_labels": [0], "guidance_scale": 1.0},
    grid=(4, 4),
    blocks=frozenset({"BasicTransformerBlock"}),
    length_name="",
    cuts=(False, False),
    levels=lambda scheduler: 1 - scheduler.sigmas[:-1],
)
