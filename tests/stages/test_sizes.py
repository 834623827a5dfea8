"""Sizes that a model cannot draw are refused by every command, before it does anything."""

import json
from pathlib import Path

import pytest

from asymlift.artifacts.diffusers_folder import DiffusersFolder
from asymlift.data.buckets import Fit, buckets
from asymlift.errors import BadData, BadRecipe
from asymlift.families import FAMILIES
from asymlift.families.base import Geometry
from asymlift.recipe import check_recipe
from asymlift.runtime.dist import Ranks
from asymlift.stages.finetune.run import finetune
from asymlift.stages.locate import family_of
from asymlift.stages.plan.estimate import plan
from asymlift.stages.prepare import job as job_of
from asymlift.stages.sizes import Sizes
from asymlift.stages.verbs import (
    SampleRequest,
    check_finetune,
    check_prepare,
    check_sample,
    prepare_job,
    run_convert,
    run_fit_basis,
    run_sample,
)
from tests.stages.prepare.small_prepare import make_folder, run, values_for
from tests.stages.small_run import recipe_values
from tests.tiny import write_pipeline

CONFIGS = {
    "auraflow": {"pos_embed_max_size": 64**2},
    "hidream": {"max_resolution": (128, 128), "patch_size": 2},
    "lumina2": {"axes_lens": (300, 512, 512)},
}
USUAL = Geometry(vae_factor=8, channels=4, patch=2)


def sizes(name, geometry=USUAL):
    return Sizes(FAMILIES[name], geometry, CONFIGS.get(name, {}), Path("config.json"))


@pytest.mark.parametrize(
    ("name", "grid", "reason"),
    [
        ("auraflow", (64, 64), None),
        ("auraflow", (65, 8), "this model knows 64 positions along a side"),
        ("auraflow", (8, 65), "this model knows 64 positions along a side"),
        ("hidream", (64, 64), None),
        ("hidream", (32, 128), None),
        ("hidream", (128, 128), None),
        ("hidream", (64, 65), "this model knows 4096 tokens of one that is no square"),
        ("lumina2", (512, 512), None),
        ("lumina2", (513, 1), "this model knows 512 rows and 512 columns"),
        ("lumina2", (1, 513), "this model knows 512 rows and 512 columns"),
        ("qwenimage21", (2, 2), None),
        ("qwenimage21", (4, 3), None),
        ("qwenimage21", (2, 3), "they cannot be cut into slots of 4"),
        ("sit", (7, 7), None),
        ("sit", (7, 8), "its class draws squares only"),
        ("flux2", (1, 5000), None),
    ],
)
def test_a_family_says_which_grids_it_draws(name, grid, reason):
    assert FAMILIES[name].why_not_grid(CONFIGS.get(name, {}), grid) == reason


@pytest.mark.parametrize(
    ("name", "geometry", "fit", "said"),
    [
        ("auraflow", USUAL, {"sides": (1024,)}, "12 of its 13 .* set data.resize.step: 512"),
        ("auraflow", USUAL, {"sides": (2048, 512)}, r"set data.resize.sides: \[512\]"),
        ("auraflow", USUAL, {"sides": (2048,)}, "choose other data.resize.sides"),
        ("auraflow", USUAL, {"sides": (1024, 1008)}, "set data.resize.max_aspect: 1"),
        ("sit", USUAL, {"sides": (256,)}, "set data.resize.step: 128"),
        ("qwenimage21", Geometry(16, 64, 1), {"sides": (256,)}, "set data.resize.step: 32"),
    ],
)
def test_the_refusal_of_buckets_says_what_to_change_and_that_helps(name, geometry, fit, said):
    asked, model = Fit(**fit, patch=16), sizes(name, geometry)
    with pytest.raises(BadRecipe, match=said) as refused:
        model.check_resize(asked)
    assert f"tokens, which {name} cannot draw, as " in str(refused.value)
    if "set" in said:
        key, _, value = str(refused.value).rpartition("data.resize.")[2].partition(": ")
        value = json.loads(value)
        better = Fit(**{**fit, key: tuple(value) if key == "sides" else value}, patch=16)
        model.check_resize(better)
        assert buckets(better)


def test_a_size_is_told_in_pixels_and_in_tokens():
    said = "1344 x 768 pixels are 48 x 84 tokens, which auraflow cannot draw, as this model knows"
    with pytest.raises(BadRecipe, match=f"^{said} 64 .* change sample.height or sample.width$"):
        sizes("auraflow").check_drawn(768, 1344)
    with pytest.raises(BadData, match=f"^photos: {said} 64 .* once it is again$"):
        sizes("auraflow").check_stored([[1024, 1024], [768, 1344]], "photos")
    sizes("auraflow").check_drawn(1024, 1024)


@pytest.mark.parametrize("config", [{"axes_lens": 5}, {"axes_lens": [300, "a", 2]}])
def test_a_config_that_says_nonsense_is_named(config):
    model = Sizes(FAMILIES["lumina2"], USUAL, config, Path("base/transformer/config.json"))
    with pytest.raises(BadData, match=r"base/transformer/config.json: does not say what sizes"):
        model.why_not((64, 64))


# ---- the commands ------------------------------------------------------------------------------


def values_of(tmp_path, name, resize):
    """Pictures around 32 x 32, prepared by a family whose patches have 8 pixels."""
    base = tmp_path / "model"
    if not base.exists():
        write_pipeline(base, name)
        make_folder(tmp_path / "source", 12)
    values = values_for(tmp_path, data={"resize": resize}, text="none", latents="none")
    ours = recipe_values(tmp_path / "runs", "small")
    ours["finetune"] |= {"preview": {"prompts": ["a bee"], "guidance": 1.0}, "steps": 1}
    ours["finetune"]["loss"] |= {"perceptual": None}
    return {**ours, **values, "model": {"base": str(base), "text_length": 12}}


@pytest.fixture(scope="module")
def lifted(tmp_path_factory):
    """A lifted SiT, which draws squares; its shards are squares."""
    folder = tmp_path_factory.mktemp("sizes")
    values = values_of(folder, "sit", {"sides": [32], "step": 32})
    for number in range(12):
        (folder / "source" / f"{number:03d}.txt").write_text("0")
    assert run(check_recipe(values, "squares")).num_samples == 12
    values["data"] |= {"train": str(folder / "out")}
    recipe = check_recipe(values, "squares")
    run_fit_basis(recipe, accept_poor_fit=True)
    run_convert(recipe, verify="maps")
    return values


SQUARES = "which sit cannot draw, as its class draws squares only"


def test_prepare_refuses_before_it_loads_an_encoder(lifted, monkeypatch):
    oblong = {**lifted, "data": {**lifted["data"], "resize": {"sides": [32]}}}
    recipe = check_recipe(oblong, "oblong")
    monkeypatch.setattr(job_of, "Encoders", None)
    for command in (check_prepare, prepare_job):
        with pytest.raises(BadRecipe, match=f"{SQUARES}; set data.resize.step: 16"):
            command(recipe)


def test_shards_that_were_prepared_keep_their_sizes_and_are_looked_at(lifted, tmp_path):
    """Made for FLUX.2, which draws any size; SiT does not, and `data.resize` is not asked."""
    folder = tmp_path / "flux2"
    values = values_of(folder, "flux2", {"sides": [32]})
    assert run(check_recipe(values, "any size")).num_samples == 12
    data = {"workers": 1, "train": str(folder / "out")}
    prepare = {**values["prepare"], "source": str(folder / "out"), "out": str(tmp_path / "again")}
    recipe = check_recipe({**lifted, "data": data, "prepare": prepare}, "again")
    with pytest.raises(BadData, match=rf"out/000000.tar: .* {SQUARES}; other data.resize.sides"):
        prepare_job(recipe)
    with pytest.raises(BadData, match=rf"out: .* {SQUARES}; other data.resize.sides"):
        finetune(recipe, Ranks(0, 1, 0))
    squares = {**prepare, "source": lifted["prepare"]["out"]}
    assert prepare_job(check_recipe({**lifted, "data": data, "prepare": squares}, "x")).as_stored


def test_finetune_and_plan_refuse_both_sizes(lifted, monkeypatch):
    monkeypatch.setattr("asymlift.stages.finetune.run.Encoders", None)
    commands = (check_finetune, lambda r: finetune(r, Ranks(0, 1, 0)), lambda r: plan(r, 1, 80))
    wide = {**lifted, "sample": {**lifted["sample"], "width": 64}}
    oblong = {**lifted, "data": {**lifted["data"], "resize": {"sides": [32]}}}
    for values, said in ((wide, "change sample.height or"), (oblong, "set data.resize.step: 16")):
        for command in commands:
            with pytest.raises(BadRecipe, match=f"{SQUARES}; {said}"):
                command(check_recipe(values, "recipe"))
    assert check_finetune(check_recipe(lifted, "squares"))["ranks"] == 1


def test_sizes_of_shards_that_were_prepared_are_not_asked_of_data_resize(lifted):
    data = {key: value for key, value in lifted["data"].items() if key != "resize"}
    assert check_finetune(check_recipe({**lifted, "data": data}, "as prepared"))["ranks"] == 1
    pictures = {**data, "train": lifted["prepare"]["source"]}
    with pytest.raises(BadRecipe, match=SQUARES):
        check_finetune(check_recipe({**lifted, "data": pictures}, "from pictures"))


def test_sample_refuses_before_it_draws(lifted):
    wide = check_recipe({**lifted, "sample": {**lifted["sample"], "width": 64}}, "wide")
    for weights in ("base", "lifted"):
        request = SampleRequest(prompts=("0",), weights=(weights,))
        for command in (check_sample, run_sample):
            with pytest.raises(BadRecipe, match=f"{SQUARES}; change sample.height or sample.width"):
                command(wide, request)


def test_the_tiny_models_folder_is_read_as_its_config_is(tmp_path):
    write_pipeline(tmp_path / "auraflow", "auraflow")
    recipe = check_recipe(
        {"name": "x", "model": {"base": str(tmp_path / "auraflow")}, "data": {"train": "unused"}},
        "recipe",
    )
    family, geometry = family_of(recipe, tmp_path / "auraflow")
    model = Sizes.of(DiffusersFolder(tmp_path / "auraflow"), family, geometry)
    p = geometry.pixel_patch
    assert model.fine((8 * p, 8 * p)) and not model.fine((9 * p, p))
