"""`sample` of a model whose pipeline guides against a second network, which sees no words."""

import dataclasses
import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

from asymlift.artifacts.checkpoint import committing
from asymlift.artifacts.lifted_folder import read_lifted
from asymlift.artifacts.manifest import digest_json
from asymlift.data.order import derive
from asymlift.data.pictures import decode_image, image_to_float
from asymlift.errors import BadData, CannotWrite
from asymlift.maths.patches import image_to_tokens, tokens_to_image
from asymlift.maths.schedule import tau_from_sigma
from asymlift.model.painting import Canvas
from asymlift.model.sampling import SampleSettings, latent_noise
from asymlift.runtime import third_party
from asymlift.stages.convert import convert
from asymlift.stages.sample import SamplePlan, Sources, sample
from asymlift.stages.sample_folder import INDEX
from tests import tiny
from tests.families.case import case_of
from tests.families.test_pipelines import scheduler_with
from tests.stages.test_convert import real_plan

NAME, SECOND = "ideogram4", "unconditional_transformer"
WEIGHTS = "diffusion_pytorch_model.safetensors"
CASE = case_of(NAME)
PROMPT = CASE.call["prompt"]
LEVEL = 2 / 255  # of a picture's 256, in [-1, 1]
PLAIN = SampleSettings("euler", 4, guidance=3.0, orthogonal=0.0, clamp=False, shift="base")


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """A base, what convert makes of it, and a checkpoint whose last map has moved."""
    root = tmp_path_factory.mktemp("wordless")
    base = tiny.write_pipeline(root / "base", NAME)
    converting = real_plan(root, NAME, base, verify="maps")
    convert(converting)
    lifted = read_lifted(converting.output)
    last = load_file(lifted.folder / "transformer" / WEIGHTS)["final_layer.linear.weight"]
    state = {"lora": None, "fingerprints": {"lifted": digest_json(lifted.facts)}}
    with committing(root / "checkpoints", 1, state) as staged:
        for name in ("trainable", "ema"):
            save_file({"final_layer.linear.weight": 1.1 * last}, staged / f"{name}.safetensors")
    return {
        "base": base,
        "lifted": converting.output,
        "checkpoint": root / "checkpoints" / "step-000001",
    }


@pytest.fixture
def plan(folders, tmp_path):
    return SamplePlan(
        out=tmp_path / "samples",
        prompts=(PROMPT,),
        height=CASE.height,
        width=CASE.width,
        weights=("base", "lifted", "ema"),
        settings=PLAIN,
        text_length=CASE.length,
        device="cpu",
        precision="float32",
        **folders,
    )


def drawn(plan, name="samples", **changes):
    """The pictures by weights, in [-1, 1], and what the index says that guidance goes against."""
    plan = dataclasses.replace(plan, out=plan.out.with_name(name), **changes)
    sample(plan)
    index = json.loads((plan.out / INDEX).read_bytes())
    found = {
        entry["weights"]: image_to_float(decode_image((plan.out / entry["file"]).read_bytes()))
        for entry in index["pictures"]
    }
    return found, index["facts"]["guidance_against"]


def differ(one, other):
    return float((one - other).abs().max()) > 3 * LEVEL


@torch.no_grad()
def test_base_and_lifted_are_guided_as_the_base_pipeline_is(plan):
    """Its own picture, and s A z of its last latent."""
    found, against = drawn(plan)
    assert against == {"base": None, "lifted": None, "ema": ""}

    lifted, sigmas, states = read_lifted(plan.lifted), Sources(plan).noise_levels(), []
    canvas = Canvas(plan.height, plan.width, plan.seed, plan.settings, sigmas)
    z = latent_noise(canvas.noise(lifted.geometry, [derive(PROMPT, 0)]), lifted.A)
    pipeline = third_party.library("diffusers").Ideogram4Pipeline.from_pretrained(plan.base)
    pipeline.set_progress_bar_config(disable=True)
    pipeline.scheduler = scheduler_with(CASE, tau_from_sigma(sigmas, lifted.s)[:-1], states)
    (picture,) = pipeline(
        **CASE.call | {"guidance_scale": PLAIN.guidance},
        latents=CASE.start(tokens_to_image(z, 2, CASE.grid)),
        num_inference_steps=PLAIN.steps,
        output_type="pt",
    ).images
    assert (found["base"] - (2 * picture - 1)).abs().max() < LEVEL

    z = image_to_tokens(CASE.read_state(states[-1]), 2)
    image = tokens_to_image(lifted.s * z @ lifted.A.T, lifted.geometry.pixel_patch, CASE.grid)
    low = lifted.color.decode(image)[0].clamp(-1, 1)
    assert low.std() > 0.1
    assert (found["lifted"] - low).abs().max() < LEVEL


def test_trained_weights_go_against_their_own_empty_prompt(plan):
    ours, _ = drawn(plan)
    stated, _ = drawn(plan, "stated", negative_prompt="")
    assert torch.equal(ours["ema"], stated["ema"])


def test_a_prompt_that_is_given_wins_for_all_weights(plan):
    ours, _ = drawn(plan)
    empty, against = drawn(plan, "empty", negative_prompt="")
    assert set(against.values()) == {""}
    cat, against = drawn(plan, "cat", negative_prompt="a cat")
    assert set(against.values()) == {"a cat"}
    for weights in ("base", "lifted"):
        assert differ(ours[weights], empty[weights])
    for weights in plan.weights:
        assert differ(empty[weights], cat[weights])


def test_pictures_guided_otherwise_are_not_mixed(plan):
    drawn(plan)
    with pytest.raises(CannotWrite, match="guidance_against"):
        drawn(plan, negative_prompt="")


def test_without_guidance_the_second_network_is_not_read(plan, tmp_path):
    folder = tmp_path / "base"
    shutil.copytree(plan.base, folder)
    (folder / SECOND / WEIGHTS).unlink()
    plan = dataclasses.replace(plan, base=folder)
    unguided = dataclasses.replace(PLAIN, guidance=1.0)
    drawn(plan, settings=unguided)
    with pytest.raises(BadData, match=f"{SECOND}: no weights"):
        drawn(plan, "guided")


def test_a_base_without_the_second_network_goes_against_the_empty_prompt(plan, tmp_path):
    folder = tmp_path / "base"
    shutil.copytree(plan.base, folder)
    shutil.rmtree(folder / SECOND)
    _, against = drawn(plan, base=folder, weights=("base",))
    assert against == {"base": ""}


def test_another_second_network_than_the_one_that_was_lifted_is_refused(plan, tmp_path):
    folder = tmp_path / "base"
    shutil.copytree(plan.base, folder)
    weights = load_file(folder / SECOND / WEIGHTS)
    weights["final_layer.linear.bias"] += 1
    save_file(weights, folder / SECOND / WEIGHTS)
    with pytest.raises(BadData, match=f"lifted from another base {SECOND} than the one given"):
        drawn(plan, base=folder)


def test_rows_of_a_grid_say_what_they_were_guided_against(plan):
    labels = [Sources(plan).label(weights) for weights in plan.weights]
    assert [label.rpartition("\n")[2] for label in labels] == ["against no words"] * 2 + [
        "against ''"
    ]
    unguided = dataclasses.replace(plan, settings=dataclasses.replace(PLAIN, guidance=1.0))
    assert Sources(unguided).label("base") == "latent base"
