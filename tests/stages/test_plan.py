"""plan: what it says of a recipe, and how far that is from what a finetune takes."""

import json
from pathlib import Path

import pytest
import yaml
from typer.testing import CliRunner

from asymlift.artifacts.diffusers_folder import DiffusersFolder
from asymlift.cli import app
from asymlift.data.writer import write_shard
from asymlift.embedded import MODELS
from asymlift.embedded.scenes import make_scenes
from asymlift.families.base import Geometry
from asymlift.recipe import check_recipe
from asymlift.stages.open_data import open_data
from asymlift.stages.plan.data import look_at_data
from asymlift.stages.plan.estimate import GIB, as_json, plan, render
from asymlift.stages.plan.memory import Limits, Planner, alternatives
from asymlift.stages.plan.model import Blueprint, blueprint_of
from benchmarks.plan_memory import measured, predicted, recipe_values, write_lifted
from tests.reliability.fake_pipeline import TWO_NETWORKS, write_base
from tests.stages.small_run import encoded
from tests.stages.small_run import recipe_values as small_values

SMALL = {
    "in_channels": 16,
    "num_layers": 2,
    "num_single_layers": 2,
    "attention_head_dim": 32,
    "num_attention_heads": 4,
    "joint_attention_dim": 64,
    "axes_dims_rope": (8, 8, 8, 8),
    "guidance_embeds": False,
}


def small(tmp_path, **finetune):
    values = small_values(tmp_path)
    values["data"]["resize"] = {"sides": [32]}
    values["finetune"] |= finetune
    return values


def recipe_of(tmp_path, **finetune):
    return check_recipe(small(tmp_path, **finetune), "small recipe")


def test_a_plan_is_within_15_percent_of_a_real_step(tmp_path):
    """Full finetuning, and LoRA with accumulation: the engine's own tensors, counted."""
    write_lifted(tmp_path, "flux2", SMALL)
    cases = {
        "full": recipe_values(tmp_path, {"train": "full", "loss": {"reference": "copy"}}, 1),
        "lora": recipe_values(tmp_path, {"batch": 6, "gradient_checkpointing": True}, 1),
    }
    cases["full"]["finetune"]["loss"] |= {"perceptual": None}
    for name, real in measured(cases, 1, bucket=100_000):
        said = predicted(cases[name], 1, bucket=100_000)
        assert said["tensors"] == pytest.approx(real["tensors"], rel=0.15), name
        assert said["showing"] == real["showing"], name


def test_a_second_network_is_no_encoder_but_takes_disk(tmp_path):
    folder = DiffusersFolder(write_base(tmp_path, second=True))
    blueprint = Blueprint(TWO_NETWORKS, Geometry(2, 2, 2), {}, {}, folder, "")
    sizes = blueprint.file_bytes
    assert blueprint.encoder_bytes == sizes["vae"] + sizes["text_encoder"]
    assert sum(sizes.values()) - blueprint.encoder_bytes == 2 * sizes["transformer"]


def test_the_report_marks_the_recipes_own_setting_and_adds_up(tmp_path):
    report = plan(recipe_of(tmp_path), gpus=2, gpu_memory=80)
    own = report.own
    assert own.label == "stage 2"
    assert own.needed == own.highest + own.margin
    assert own.highest == sum(own.resident.values()) + max(own.phases.values())
    assert report.tokens == 16
    assert (report.accumulation, report.seen) == (1, 64)
    assert [memory.label for memory in report.memory] == [
        *(f"stage {n}" for n in range(4)),
        "stage 2, offload optimizer",
        "stage 3, offload all",
    ]
    text = "\n".join(render(report))
    assert "stage 2 *" in text
    assert "fits: " in text
    assert text.isascii()
    document = json.loads(json.dumps(as_json(report)))
    assert document["memory"][2]["fits"] is True


def test_what_does_not_fit_comes_with_what_to_change(tmp_path):
    report = plan(recipe_of(tmp_path), gpus=2, gpu_memory=1.4)
    assert not report.fits
    text = "\n".join(render(report))
    assert "TOO MUCH" in text
    assert "does not fit" in text


def test_a_change_saves_what_the_changed_recipe_needs_less(tmp_path):
    recipe, limits = recipe_of(tmp_path), Limits(bucket=1000)
    planner = Planner(recipe, blueprint_of(recipe), 2, limits=limits)
    changes = {change.override: change for change in planner.changes()}
    halved = changes["finetune.micro_batch=2"]
    other = recipe_of(tmp_path, micro_batch=2)
    assert halved.needed == Planner(other, blueprint_of(other), 2, limits=limits).own.needed
    assert halved.saves == planner.own.needed - halved.needed > 0
    assert changes["finetune.gradient_checkpointing=true"].saves > 0


def test_alternatives_keep_the_batch_whole(tmp_path):
    for key, value, _, settings in alternatives(recipe_of(tmp_path).finetune, 2):
        assert settings.batch % (settings.micro_batch * 2) == 0, (key, value)


def test_shards_that_are_indexed_say_how_many_samples_there_are(tmp_path):
    recipe = recipe_of(tmp_path)
    assert look_at_data(recipe, 8).samples is None
    for number in range(2):
        keys = [f"{number}{n}" for n in range(4)]
        samples = encoded(make_scenes(range(4), seed=0, size=32), keys)
        write_shard(tmp_path / "shards" / f"{number:06d}.tar", samples)
    open_data(recipe.data.train, recipe.data, 8)
    found = look_at_data(recipe, 8)
    assert (found.samples, found.size) == (8, (32, 32))
    assert not found.text_online
    assert not found.latents_online


def test_a_config_alone_is_enough(tmp_path):
    for name in ("model_index.json", "transformer/config.json", "vae/config.json"):
        target = tmp_path / "base" / name
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_bytes((MODELS["tiny"] / name).read_bytes())
    values = small(tmp_path)
    values["model"]["base"] = str(tmp_path / "base")
    bare, recipe = check_recipe(values, "bare"), recipe_of(tmp_path)
    found, whole = blueprint_of(bare), blueprint_of(recipe)
    assert "no weights there" in found.source
    assert Planner(bare, found, 1).own.phases == Planner(recipe, whole, 1).own.phases


@pytest.mark.parametrize("stage, shared", [(0, 1), (2, 1), (3, 4)])
def test_previews_or_validation_take_the_largest_tensor_to_show_the_average(
    tmp_path, stage, shared
):
    """Not a second copy of the weights; and nothing where there is no average."""
    preview, validation = {"every": 1, "prompts": ["a disc"]}, {"every": 1, "samples": 2}
    zero, phase = {"stage": stage}, "showing the average"

    def phases(**finetune):
        values = small(tmp_path, zero=zero, train="full", **finetune)
        values["data"]["validation"] = values["data"]["train"]
        recipe = check_recipe(values, "small recipe")
        planner = Planner(recipe, blueprint_of(recipe), 4)
        return planner.own.phases, planner.weights(recipe.finetune)

    alone, weights = phases(preview=None, validation=None)
    assert phase not in alone
    for use in ({"preview": preview}, {"preview": None, "validation": validation}):
        found, _ = phases(**use)
        assert found[phase] == -(-4 * weights.largest // shared) < 4 * weights.trained / 5
        assert phase not in phases(**use, ema=None)[0]


def test_only_the_base_of_a_preview_in_float32_is_on_the_host_before_it_is_on_the_device(tmp_path):
    def loading(**finetune):
        recipe = recipe_of(tmp_path, train="full", **finetune)
        planner = Planner(recipe, blueprint_of(recipe), 1)
        net = planner.model(recipe.finetune).step.student.net
        return planner.loading(recipe.finetune), 4 * sum(p.numel() for p in net.parameters())

    preview = {"every": 1, "prompts": ["a disc"]}
    assert loading(precision="bfloat16", preview=preview)[0] == 0
    assert loading(precision="float32", preview=None)[0] == 0
    held, base = loading(precision="float32", preview=preview)
    assert held == base > 0


def run(tmp_path: Path, *options: str, base: str = "embedded:tiny"):
    values = small(tmp_path)
    values["model"]["base"] = base
    path = tmp_path / "recipe.yaml"
    path.write_text(yaml.safe_dump(values))
    return CliRunner().invoke(app, ["plan", str(path), *options])


@pytest.mark.parametrize(
    ("options", "base", "code", "said"),
    [
        (["--gpus", "3"], "embedded:tiny", 78, "is not a multiple of micro_batch"),
        (["--gpus", "0"], "embedded:tiny", 2, "--gpus': Input should be greater"),
        (["--gpu-memory", "0"], "embedded:tiny", 2, "--gpu-memory': Input should be greater"),
        ([], "no/such/folder", 69, "no such folder"),
        (["--set", "finetune.zero.stage=4"], "embedded:tiny", 78, "finetune.zero.stage"),
    ],
)
def test_wrong_inputs_are_named(tmp_path, options, base, code, said):
    result = run(tmp_path, *(options or ["--gpus", "1"]), base=base)
    assert result.exit_code == code
    assert said in result.output + (result.stderr or "")


def test_what_does_not_fit_is_an_exit_code_too(tmp_path):
    """After the whole table, so that a job script can tell."""
    tight = run(tmp_path, "--gpus", "1", "--gpu-memory", "0.1")
    assert tight.exit_code == 69 and "TOO MUCH" in tight.stdout and "does not fit" in tight.stdout
    document = run(tmp_path, "--gpus", "1", "--gpu-memory", "0.1", "--json")
    assert document.exit_code == 69 and json.loads(document.stdout)["fits"] is False
    assert "69" in CliRunner().invoke(app, ["plan", "--help"]).stdout


def test_json_is_one_document(tmp_path):
    result = run(tmp_path, "--gpus", "1", "--json")
    assert result.exit_code == 0
    assert json.loads(result.stdout)["gpu_memory"] == 80 * GIB
