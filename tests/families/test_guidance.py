"""Guidance as a family's own pipeline does it, against ours."""

from typing import Any

import pytest
import torch
from torch import Tensor

from asymlift.errors import BadRecipe
from asymlift.families import FAMILIES
from asymlift.families.base import renorm_rule
from asymlift.maths.patches import image_to_tokens, tokens_to_image
from asymlift.model.pixel_flow import LatentFlow
from asymlift.model.sampling import SampleSettings, sample_latents
from tests.families.case import case_of
from tests.families.test_pipelines import scheduler_with
from tests.tiny import tiny_pipeline

# What each pipeline is told, so that its guidance is 4 of ours, renormalised.
PIPELINES: dict[str, dict[str, Any]] = {
    "longcat": {"guidance_scale": 4.0, "enable_cfg_renorm": True},
    "lumina2": {  # any other negative prompt is not put behind the system's
        "guidance_scale": 4.0,
        "cfg_normalization": True,
        "negative_prompt": "",
    },
    "nucleus": {"guidance_scale": 4.0},
    "qwenimage": {"true_cfg_scale": 4.0},
    "zimage": {"guidance_scale": 3.0, "cfg_normalization": 1.0},
}


def test_a_family_keeps_lengths_if_its_pipeline_does_and_says_so_otherwise():
    assert {name for name, family in FAMILIES.items() if family.renorm} == PIPELINES.keys()
    with pytest.raises(BadRecipe, match="guidance of Flux2KleinPipeline keeps no lengths"):
        renorm_rule(FAMILIES["flux2"])


@pytest.mark.parametrize("name", PIPELINES)
@torch.no_grad()
def test_renormalised_guidance_is_that_of_the_pipeline(name):
    family, case, pipeline = FAMILIES[name], case_of(name), tiny_pipeline(name)
    states: list[Tensor] = []
    levels = torch.linspace(1, 0, 6, dtype=torch.float64)
    pipeline.scheduler = scheduler_with(case, levels[:-1], states)
    g = torch.Generator().manual_seed(0)
    noise = torch.randn(1, case.grid[0] * case.grid[1], case.sizes.d, generator=g)
    guided = {**case.call, "negative_prompt": "a cat", **PIPELINES[name]}
    unwanted = guided["negative_prompt"]
    pipeline(
        **guided,
        latents=case.start(tokens_to_image(noise, case.sizes.patch, case.grid)),
        num_inference_steps=5,
        output_type="latent",
    )

    def embedded(prompt: str) -> dict[str, Tensor | list[Tensor]]:
        return family.collate(family.encode_prompt(pipeline, [prompt], case.length))

    flow = LatentFlow(pipeline.transformer, family, case.sizes)
    text, negative = embedded(case.call["prompt"]), embedded(unwanted)

    wanted = image_to_tokens(case.read_state(states[-1]), case.sizes.patch)

    def error(renorm: bool) -> float:
        settings = SampleSettings("euler", guidance=4.0, orthogonal=0.0, renorm=renorm)
        z = sample_latents(flow, noise, text, negative, levels, settings, case.grid)
        return float((z - wanted).norm() / wanted.norm())

    assert error(renorm=True) < 2e-4
    assert error(renorm=False) > 2e-3
