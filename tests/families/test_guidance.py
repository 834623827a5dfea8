"""Guidance as a family's own pipeline does it, against ours."""

import pytest
import torch
from torch import Tensor

from asymlift.families import FAMILIES
from asymlift.maths.patches import image_to_tokens, tokens_to_image
from asymlift.model.pixel_flow import LatentFlow
from asymlift.model.sampling import SampleSettings, sample_latents
from tests.families.case import case_of
from tests.families.test_pipelines import scheduler_with
from tests.tiny import tiny_pipeline


@pytest.mark.parametrize("name", ["qwenimage"])
@torch.no_grad()
def test_renormalised_guidance_is_that_of_the_pipeline(name):
    family, case, pipeline = FAMILIES[name], case_of(name), tiny_pipeline(name)
    states: list[Tensor] = []
    levels = torch.linspace(1, 0, 6, dtype=torch.float64)
    pipeline.scheduler = scheduler_with(case, levels[:-1], states)
    g = torch.Generator().manual_seed(0)
    noise = torch.randn(1, case.grid[0] * case.grid[1], case.sizes.d, generator=g)
    pipeline(
        **case.call,
        negative_prompt="a cat",
        true_cfg_scale=4.0,
        latents=case.start(tokens_to_image(noise, case.sizes.patch, case.grid)),
        num_inference_steps=5,
        output_type="latent",
    )

    def embedded(prompt: str) -> dict[str, Tensor | list[Tensor]]:
        return family.collate(family.encode_prompt(pipeline, [prompt], case.length))

    flow = LatentFlow(pipeline.transformer, family, case.sizes)
    text, negative = embedded(case.call["prompt"]), embedded("a cat")

    def drawn(renorm: bool) -> Tensor:
        settings = SampleSettings("euler", guidance=4.0, orthogonal=0.0, renorm=renorm)
        return sample_latents(flow, noise, text, negative, levels, settings, case.grid)

    wanted = image_to_tokens(case.read_state(states[-1]), case.sizes.patch)
    torch.testing.assert_close(drawn(renorm=True), wanted, rtol=1e-3, atol=1e-4)
    assert (drawn(renorm=False) - wanted).norm() > 0.01 * wanted.norm()
