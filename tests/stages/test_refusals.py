"""Every command refuses what cannot be ported, with the reason, and tells of a poor start."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import yaml
from typer.testing import CliRunner

from asymlift.artifacts.diffusers_folder import DiffusersFolder
from asymlift.cli import app
from asymlift.embedded import MODELS
from asymlift.errors import BadData, Exit
from asymlift.stages.inspection.model import inspect_path
from asymlift.stages.locate import family_in
from tests.stages.prepare.small_prepare import make_folder
from tests.stages.small_run import build, recipe_values

EPSILON = {"_class_name": "DDIMScheduler", "prediction_type": "epsilon"}
REASON = "cannot be ported: its scheduler is a DDIMScheduler with prediction_type epsilon: it"
POOR = "distilled to draw in a few steps (model_index.json says is_distilled)"
BETTER = "Better start from black-forest-labs/FLUX.2-dev or "


def run(command: str, recipe: Path, *options: str) -> Any:
    return CliRunner().invoke(app, [command, str(recipe), *options])


def said(result: Any) -> str:
    return " ".join(result.output.split())


def change(path: Path, values: dict[str, Any]) -> None:
    """A new file: what convert made may share its bytes with the base."""
    changed = json.dumps(json.loads(path.read_text()) | values)
    path.unlink()
    path.write_text(changed)


def recipe_for(folder: Path, base: Path) -> Path:
    make_folder(folder / "source", 4)
    values = recipe_values(folder / "runs")
    values["model"]["base"] = str(base)
    values["data"] |= {"train": str(folder / "source")}
    values["prepare"] = {"source": str(folder / "source"), "out": str(folder / "out")}
    path = folder / "recipe.yaml"
    path.write_text(yaml.safe_dump(values))
    return path


@pytest.fixture
def base(tmp_path) -> Path:
    return Path(shutil.copytree(MODELS["tiny"], tmp_path / "base"))


@pytest.mark.parametrize("command", ["prepare", "fit-basis", "convert", "plan"])
def test_a_model_of_noise_is_refused_before_anything_is_done(command, base, tmp_path):
    change(base / "scheduler" / "scheduler_config.json", EPSILON)
    recipe = recipe_for(tmp_path, base)
    runs = [["--gpus", "1"]] if command == "plan" else [["--dry-run"], []]
    for result in (run(command, recipe, *options) for options in runs):
        assert result.exit_code == Exit.BAD_DATA, result.output
        assert f"{base}: {REASON}" in said(result)
    assert not (tmp_path / "out").exists() and not (tmp_path / "runs" / "run").exists()


@pytest.mark.parametrize("command", ["prepare", "fit-basis", "convert"])
def test_a_u_net_is_refused_by_name(command, base, tmp_path):
    shutil.rmtree(base / "transformer")
    index = json.loads((base / "model_index.json").read_text())
    del index["transformer"]
    index |= {"unet": ["diffusers", "UNet2DConditionModel"]}
    (base / "model_index.json").write_text(json.dumps(index))
    result = run(command, recipe_for(tmp_path, base))
    assert result.exit_code == Exit.BAD_DATA, result.output
    wanted = f"{base}: its unet is a UNet2DConditionModel, which cannot be ported: a U-Net"
    assert wanted in said(result)


def test_inspect_says_what_cannot_be_ported_and_why(base):
    change(base / "scheduler" / "scheduler_config.json", EPSILON)
    found = inspect_path(base)
    assert found.facts["can_be_ported"] is False and dict(found.rows)["can be ported"] == "no"
    assert any(REASON in problem for problem in found.problems)

    change(base / "transformer" / "config.json", {"_class_name": "PixArtTransformer2DModel"})
    found = inspect_path(base)
    assert any("a PixArtTransformer2DModel, which cannot be" in p for p in found.problems)


def test_a_folder_without_a_scheduler_is_judged_by_the_rest(base):
    shutil.rmtree(base / "scheduler")
    assert family_in(DiffusersFolder(base), "auto").name == "flux2"
    change(base / "model_index.json", {"_class_name": "FluxKontextPipeline"})
    with pytest.raises(BadData, match=r"base: made for FluxKontextPipeline, which cannot be"):
        family_in(DiffusersFolder(base), "auto")
    ours = family_in(DiffusersFolder(base), "asymlift.families.flux2:FLUX2")
    assert ours.name == "flux2"  # a family of one's own judges itself


def test_a_poor_start_is_told_by_every_command_and_goes_on(base, tmp_path):
    change(base / "model_index.json", {"is_distilled": True})
    recipe = recipe_for(tmp_path, base)
    for command in ("prepare", "fit-basis"):
        result = run(command, recipe, "--dry-run")
        assert result.exit_code == Exit.DONE, result.output
        assert f"warning: {base}: {POOR}" in said(result) and BETTER in said(result)
    row = dict(inspect_path(base).rows)
    assert POOR in row["poor start"] and row["can be ported"] == "yes, as family flux2"
    assert "poor start" not in dict(inspect_path(MODELS["tiny"]).rows)


def test_convert_and_finetune_say_it_too_and_finetune_refuses(tmp_path):
    """The lifted folder is asked, as it may be from elsewhere."""
    recipe = build(tmp_path)
    base = Path(shutil.copytree(MODELS["tiny"], tmp_path / "base"))
    change(base / "model_index.json", {"is_distilled": True})
    again = run("convert", recipe, "--set", f"model.base={base}", "--dry-run")
    assert again.exit_code == Exit.DONE and f"warning: {base}: {POOR}" in said(again)

    lifted = tmp_path / "run" / "lifted"
    change(lifted / "model_index.json", {"is_distilled": True})
    options = ["--set", "finetune.steps=1", "--set", "finetune.checkpoint.every=1"]
    trained = run("finetune", recipe, *options)
    assert trained.exit_code == Exit.DONE, trained.output
    assert f"warning: embedded:tiny: {POOR}" in said(trained)

    change(lifted / "scheduler" / "scheduler_config.json", EPSILON)
    refused = run("finetune", recipe, "--set", "finetune.steps=2")
    assert refused.exit_code == Exit.BAD_DATA, refused.output
    assert f"{lifted}: {REASON}" in said(refused)
