"""A model from outside the package, ported from pictures to samples with the commands alone."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from torch import nn
from typer.testing import CliRunner

from asymlift.artifacts.lifted_folder import FACTS
from asymlift.cli import app
from asymlift.errors import BadData, Exit
from asymlift.model.loading import load_pipeline_parts
from asymlift.runtime import third_party
from tests.stages.prepare.small_prepare import make_folder
from tests.stages.small_run import recipe_values

OWN = "tests.own_model:FAMILY"


def run(*arguments: object) -> str:
    result = CliRunner().invoke(app, [str(argument) for argument in arguments])
    assert result.exit_code == Exit.DONE, result.output
    return result.output


def own_folder(folder: Path) -> Path:
    third_party.prepare()
    from tests.own_model import OwnPipeline, OwnTextEncoder, OwnTransformer, OwnVae

    torch.manual_seed(0)
    vae = OwnVae()
    with torch.no_grad():
        rows = nn.init.orthogonal_(vae.down.weight.flatten(1)).view_as(vae.down.weight)
        vae.down.weight.copy_(rows)
        vae.up.weight.copy_(rows)
    scheduler = third_party.library("diffusers").FlowMatchEulerDiscreteScheduler(shift=2.0)
    OwnPipeline(OwnTransformer(), vae, OwnTextEncoder(), scheduler).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def recipe(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("own")
    base = own_folder(folder / "model")
    make_folder(folder / "source", 64)
    values: dict[str, Any] = recipe_values(folder / "runs")
    values["model"] = {"base": str(base), "family": OWN, "text_length": 12}
    values["data"] |= {"train": str(folder / "shards"), "resize": {"sides": [32]}}
    values["prepare"] = {"source": str(folder / "source"), "out": str(folder / "shards")}
    values["finetune"] |= {
        "steps": 3,
        "train": {"lora": {"rank": 2, "alpha": 2}},
        "loss": {"weight": 1.0, "perceptual": {"net": "embedded", "weight": 0.2}},
    }
    path = folder / "recipe.yaml"
    path.write_text(yaml.safe_dump(values))
    return path


def test_it_is_ported_trained_and_sampled(recipe):
    run("prepare", recipe)
    run("fit-basis", recipe)
    run("convert", recipe, "--verify", "full")
    run("finetune", recipe)
    run("sample", recipe, "--prompt", "a red disc", "--num", 1, "--compare")

    folder = recipe.parent / "runs" / "run"
    facts = json.loads((folder / "lifted" / FACTS).read_text())
    assert facts["family"] == OWN
    assert facts["verification"]["coupling"]["error"] < 1e-5
    lines = (folder / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(line)["step"] for line in lines] == [1, 2, 3]
    assert list(folder.glob("samples/*/*.png"))
    assert "tests.own_model" in run("inspect", folder / "lifted")


def test_code_of_ones_own_is_run_only_if_the_recipe_names_it(recipe):
    """The folder names its classes, and auto does not know them."""
    result = CliRunner().invoke(app, ["convert", str(recipe), "--set", "model.family=auto"])
    assert result.exit_code == Exit.BAD_RECIPE
    assert "no family for the checkpoint's transformer, OwnTransformer" in result.output

    base = recipe.parent / "model"
    with pytest.raises(BadData, match=r"vae needs code from 'tests.own_model'; only classes of"):
        load_pipeline_parts(base, ["vae"])
    with pytest.raises(BadData, match="only classes of"):
        load_pipeline_parts(base, ["vae"], library="tests.own")
    assert load_pipeline_parts(base, ["vae"], library="tests.own_model")["vae"].config.channels == 4
