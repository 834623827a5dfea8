"""What is peculiar to Ideogram 4: a second network, levels of its own, padding anywhere."""

import copy
import importlib
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from asymlift.families import FAMILIES
from asymlift.families.text import without_words
from asymlift.maths.patches import image_to_tokens, tokens_to_image
from asymlift.maths.schedule import sigma_from_tau
from asymlift.model.pixel_flow import LatentFlow
from asymlift.model.sampling import SampleSettings, sample_latents
from asymlift.runtime import third_party
from tests.families.case import case_of
from tests.families.test_pipelines import intercept, level, relative, scheduler_with
from tests.tiny import lifted_pair, tiny_pipeline, tiny_text, tiny_transformer

FAMILY, CASE = FAMILIES["ideogram4"], case_of("ideogram4")
NUM = CASE.grid[0] * CASE.grid[1]
LEVELS = torch.linspace(1, 0, 6, dtype=torch.float64)
GUIDANCE = 4.0


def guided_by_pipeline(net, second, noise, levels=LEVELS):
    """The last tokens of the real pipeline around these two networks."""
    pipeline, states = tiny_pipeline("ideogram4", transformer=net), []
    pipeline.unconditional_transformer = second
    pipeline.scheduler = scheduler_with(CASE, levels[:-1], states)
    pipeline(
        **CASE.call | {"guidance_scale": GUIDANCE},
        latents=CASE.start(tokens_to_image(noise, 2, CASE.grid)),
        num_inference_steps=len(levels) - 1,
        output_type="latent",
    )
    return image_to_tokens(CASE.read_state(states[-1]), 2)


def random_tokens(width):
    return torch.randn(1, NUM, width, generator=torch.Generator().manual_seed(0))


@torch.no_grad()
def test_guidance_is_that_of_the_pipeline():
    net, second = tiny_transformer("ideogram4"), tiny_transformer("ideogram4", seed=7)
    noise = random_tokens(CASE.sizes.d)
    wanted = guided_by_pipeline(net, second, noise)
    pipeline = tiny_pipeline("ideogram4", transformer=net)
    text, empty = (
        FAMILY.collate(FAMILY.encode_prompt(pipeline, [prompt], CASE.length))
        for prompt in (CASE.call["prompt"], "")
    )
    nothing = without_words(text)
    flow, unguided = (LatentFlow(one, FAMILY, CASE.sizes) for one in (net, second))

    def error(null, against):
        settings = SampleSettings("euler", guidance=GUIDANCE, orthogonal=0.0)
        z = sample_latents(
            flow, noise, text, null, LEVELS, settings, CASE.grid, None, against=against
        )
        return relative(z, wanted)

    assert error(nothing, unguided) < 1e-5
    assert error(nothing, flow) > 0.05
    assert error(empty, unguided) > 0.05
    assert error(empty, flow) > 0.05


@torch.no_grad()
def test_the_stock_pipeline_guides_one_lifted_network_against_the_other():
    """From matched noise it ends on s A z of the latent pipeline, which is guided too."""
    seeds = {"transformer": 1, "unconditional_transformer": 7}
    pairs = {
        component: lifted_pair(
            "ideogram4", net=tiny_transformer("ideogram4", seed=seed), dtype=torch.float32
        )
        for component, seed in seeds.items()
    }
    first = pairs["transformer"]
    eps, A, s = random_tokens(first.geometry.D), first.A, first.s
    z = guided_by_pipeline(*(pair.latent.net for pair in pairs.values()), eps @ A)

    def stand_in(component):
        pair = pairs[component]
        net = copy.deepcopy(pair.pixel.net)  # the pipeline looks at its config

        def pixels(x_t: Tensor, time: Tensor, text, call) -> Tensor:
            tokens = image_to_tokens(x_t, 2)
            u = pair.pixel(tokens, level(FAMILY, time, NUM), text, CASE.grid, floor=1e-6)
            return FAMILY.sign * tokens_to_image(u, 2, CASE.grid)

        alone = component == "unconditional_transformer"  # no words come before its picture
        intercept(net, replace(CASE, write=CASE.start) if alone else CASE, pixels)
        return net

    x = guided_by_pipeline(*map(stand_in, pairs), eps, sigma_from_tau(LEVELS, s))
    assert relative(x, s * z @ A.T) < 2e-4  # float32 levels, times 1000


@pytest.mark.parametrize("size", [(256, 512), (1024, 1024), (2048, 1536)])
def test_larger_pictures_are_shifted_as_the_pipeline_does(size):
    """Against its levels for 512 x 512 pixels, which its logit-normal spaces and no shift does."""
    pipeline = third_party.library("diffusers").Ideogram4Pipeline
    module = importlib.import_module(pipeline.__module__)
    own, usual = (
        module._logit_normal_sigmas(20, module._resolution_aware_mu(*pixels, 0.0), std=1.5)
        for pixels in (size, (512, 512))
    )
    shift = FAMILY.base_shift({"shift": 1.0}, size[0] * size[1] // 16**2)
    torch.testing.assert_close(own[1:], (shift * usual / (1 + (shift - 1) * usual))[1:])


@torch.no_grad()
def test_padding_may_lie_on_either_side_of_the_words():
    """The pipeline pads before them, our batches behind."""
    net, text = tiny_transformer("ideogram4"), tiny_text("ideogram4", 1)
    words, mask = text["encoder_hidden_states"], text["encoder_attention_mask"]
    gap, nothing = torch.ones_like(words[:, :3]), torch.zeros_like(mask[:, :3])
    image, time = torch.ones(1, 4, 4, 6), torch.full((1,), 0.3)
    plain = FAMILY.run(net, image, time, text)
    for order in (slice(None), slice(None, None, -1)):
        padded = {
            "encoder_hidden_states": torch.cat([gap, words][order], 1),
            "encoder_attention_mask": torch.cat([nothing, mask][order], 1),
        }
        torch.testing.assert_close(FAMILY.run(net, image, time, padded), plain)


def test_a_long_prompt_is_cut_where_the_pipeline_refuses_it():
    pipeline = tiny_pipeline("ideogram4")
    with pytest.raises(ValueError, match="exceeds max_sequence_length"):
        pipeline.encode_prompt("a" * 50, 4, 6, 12, "cpu")
    (short,), (whole,) = (FAMILY.encode_prompt(pipeline, ["a" * 50], n) for n in (12, None))
    assert len(short["encoder_hidden_states"]) == 12
    first = whole["encoder_hidden_states"][:12]
    torch.testing.assert_close(short["encoder_hidden_states"], first)
