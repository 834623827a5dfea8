"""A folder that diffusers' modular pipeline has saved is a base like any other."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file
from typer.testing import CliRunner

from asymlift.artifacts.diffusers_folder import DiffusersFolder
from asymlift.artifacts.lifted_folder import FACTS
from asymlift.cli import app
from asymlift.embedded import MODELS
from asymlift.errors import BadData, Exit
from asymlift.families import FAMILIES
from asymlift.model.loading import load_pipeline, load_pipeline_parts
from asymlift.runtime import third_party
from asymlift.stages.inspection.model import inspect_path
from asymlift.stages.locate import base_shift_of, family_in
from tests.families.case import case_of, save_modular
from tests.stages.prepare.small_prepare import make_folder
from tests.stages.small_run import recipe_values
from tests.tiny import tiny_pipeline, write_pipeline

INDEX = "modular_model_index.json"
PLAIN = "model_index.json"
WEIGHTS = "transformer/diffusion_pytorch_model.safetensors"


def run(*arguments: object) -> str:
    result = CliRunner().invoke(app, [str(argument) for argument in arguments])
    assert result.exit_code == Exit.DONE, result.output
    return result.output


def change(folder: Path, name: str, entry: object) -> None:
    """Another entry in the modular index; a new file, since convert links what it can."""
    index = json.loads((folder / INDEX).read_text())
    (folder / INDEX).unlink()
    (folder / INDEX).write_text(json.dumps(index | {name: entry}))


def loads_from(kind: str, repo: object, subfolder: str = "", **more: Any) -> list[Any]:
    said = {"pretrained_model_name_or_path": repo and str(repo), "subfolder": subfolder}
    return [None, None, {**said, "type_hint": kind.split("."), **more}]


def as_diffusers_loads(folder: Path) -> Any:
    pipeline = third_party.library("diffusers").ModularPipeline.from_pretrained(str(folder))
    pipeline.load_components()
    return pipeline


# ---- from pictures to samples, by the commands alone ---------------------------------------------


@pytest.fixture(scope="module")
def recipe(tmp_path_factory) -> Path:
    """Anima's folder was moved since it was saved, and its index leads to another transformer."""
    folder = tmp_path_factory.mktemp("modular")
    base = write_pipeline(folder / "saved", "anima").rename(folder / "model")
    other = shutil.copytree(base / "transformer", folder / "other")
    change(base, "transformer", loads_from("diffusers.CosmosTransformer3DModel", other))
    make_folder(folder / "source", 48)
    values: dict[str, Any] = recipe_values(folder / "runs")
    values["model"] = {"base": str(base), "text_length": 12}
    values["data"] |= {"train": str(folder / "shards"), "resize": {"sides": [32]}}
    values["prepare"] = {"source": str(folder / "source"), "out": str(folder / "shards")}
    values["finetune"] |= {
        "steps": 2,
        "train": {"lora": {"rank": 2, "alpha": 2}},
        "loss": {"weight": 1.0, "perceptual": {"net": "embedded", "weight": 0.2}},
    }
    path = folder / "recipe.yaml"
    path.write_text(yaml.safe_dump(values))
    run("prepare", path)
    run("fit-basis", path, "--accept-poor-fit")  # the tiny VAE is random
    run("convert", path, "--verify", "full")
    return path


def test_a_modular_pipeline_is_ported_trained_and_sampled(recipe):
    assert not (recipe.parent / "model" / PLAIN).exists()
    said = run("inspect", recipe.parent / "model")
    assert "AnimaModularPipeline" in said and "yes, as family anima" in said
    run("finetune", recipe)
    run("sample", recipe, "--prompt", "a red disc", "--num", 1, "--compare")

    folder = recipe.parent / "runs" / "run"
    facts = json.loads((folder / "lifted" / FACTS).read_text())
    assert facts["family"] == "anima" and facts["verification"]["coupling"]["error"] < 1e-5
    assert list(folder.glob("samples/*/grid.png"))
    assert "lifted, whole" in run("verify", folder / "lifted")
    result = CliRunner().invoke(app, ["verify", str(recipe.parent / "model")])
    assert result.exit_code == Exit.BAD_DATA and "a diffusers folder without" in result.output


def test_diffusers_loads_the_lifted_transformer_and_not_the_one_the_base_named(recipe):
    """Also once the folder is moved."""
    base, lifted = recipe.parent / "model", recipe.parent / "runs" / "run" / "lifted"
    moved = shutil.copytree(lifted, recipe.parent / "moved")
    before, after = as_diffusers_loads(base), as_diffusers_loads(moved)
    assert before.transformer.config.in_channels == 4
    assert after.transformer.config.in_channels == 48
    stored = load_file(moved / WEIGHTS)
    for name, weight in after.transformer.state_dict().items():
        assert torch.equal(weight, stored[name])
    assert {name: type(part) for name, part in after.components.items()} == {
        name: type(part) for name, part in before.components.items()
    }
    index = json.loads((moved / INDEX).read_text())
    entries = {k: v for k, v in index.items() if isinstance(v, list)}
    assert len(entries) == 7
    assert all(e[2]["pretrained_model_name_or_path"] is None for e in entries.values())
    assert all(e[2]["subfolder"] == name for name, e in entries.items())


# ---- both index files ----------------------------------------------------------------------------


def test_of_both_indexes_the_plain_one_holds_and_both_load_what_was_lifted(tmp_path):
    """The modular one of a FLUX.2 klein that was downloaded leads to the hub."""
    base = Path(shutil.copytree(MODELS["tiny"], tmp_path / "base"))
    plain = json.loads((base / PLAIN).read_text())
    parts = {k: v for k, v in plain.items() if isinstance(v, list)}
    hub = {k: [*v, {"repo": "owner/other", "subfolder": "x"}] for k, v in parts.items()}
    blocks = {
        "_class_name": "Flux2KleinModularPipeline",
        "_blocks_class_name": "Flux2KleinAutoBlocks",
    }
    (base / INDEX).write_text(json.dumps(blocks | hub))
    assert DiffusersFolder(base).model_index == plain
    values = recipe_values(tmp_path / "runs")
    values["model"]["base"] = str(base)
    values["data"] |= {"train": str(make_folder(tmp_path / "source", 48))}
    values["data"] |= {"resize": {"sides": [32]}}
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(values))
    run("fit-basis", tmp_path / "recipe.yaml", "--accept-poor-fit")
    run("convert", tmp_path / "recipe.yaml", "--verify", "maps")

    lifted = tmp_path / "runs" / "run" / "lifted"
    assert (lifted / PLAIN).read_bytes() == (base / PLAIN).read_bytes()  # it leads nowhere else
    whole = third_party.library("diffusers").DiffusionPipeline.from_pretrained(str(lifted))
    channels = whole.transformer.config.in_channels
    assert channels != json.loads((base / "transformer" / "config.json").read_text())["in_channels"]
    assert as_diffusers_loads(lifted).transformer.config.in_channels == channels


# ---- families that a plain pipeline drives -------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("flux1", "FluxModularPipeline"),
        ("flux2", "Flux2KleinBaseModularPipeline"),
        ("qwenimage", "QwenImageModularPipeline"),
        ("qwenimage21", "QwenImage21TurboModularPipeline"),
        ("sd3", "StableDiffusion3ModularPipeline"),
        ("zimage", "ZImageModularPipeline"),
    ],
)
@torch.no_grad()
def test_what_a_modular_pipeline_saved_embeds_prompts_as_the_plain_one_does(name, kind, tmp_path):
    family, case, pipeline = FAMILIES[name], case_of(name), tiny_pipeline(name)
    modular = getattr(third_party.library("diffusers"), kind)()
    parts = {k: v for k, v in pipeline.components.items() if v is not None}
    modular.update_components(**parts)
    save_modular(modular, tmp_path)
    folder = DiffusersFolder(tmp_path)
    assert folder.index.name == INDEX and family_in(folder, "auto") is family

    loaded = load_pipeline(tmp_path, family=family)

    assert type(loaded).__name__ in family.pipelines
    (wanted,) = family.encode_prompt(pipeline, ["a bee"], case.length)
    (got,) = family.encode_prompt(loaded, ["a bee"], case.length)
    assert got.keys() == wanted.keys()
    for key, tensor in wanted.items():
        torch.testing.assert_close(got[key], tensor)


def test_a_modular_pipeline_that_is_not_like_any_of_the_familys_is_named(tmp_path):
    write_pipeline(tmp_path, "anima")
    change(tmp_path, "_class_name", "QwenImageModularPipeline")
    said = "family anima is driven by AnimaModularPipeline, not by QwenImageModularPipeline"
    with pytest.raises(BadData, match=said):
        load_pipeline(tmp_path, ["scheduler"], family=FAMILIES["anima"])


# ---- parts that are elsewhere, or nowhere --------------------------------------------------------


@pytest.fixture
def flux3(tmp_path) -> Path:
    return write_pipeline(tmp_path / "model", "flux3")


def test_a_part_of_another_repository_is_not_fetched_but_named(flux3):
    shutil.rmtree(flux3 / "vae")
    change(flux3, "vae", loads_from("diffusers.AutoencoderKLFlux2", "owner/other", "vae"))
    said = (
        rf"there is no vae/ in this pipeline folder; {INDEX} takes it from owner/other, and "
        rf"nothing is downloaded unasked\. To have it: `hf download owner/other --include 'vae/\*' "
        rf"--local-dir {flux3}`"
    )
    with pytest.raises(BadData, match=said):
        load_pipeline_parts(flux3, ["vae"])
    with pytest.raises(BadData, match=said):
        load_pipeline(flux3, family=FAMILIES["flux3"])
    found = inspect_path(flux3)
    assert not found.facts["can_be_ported"] and "takes it from owner/other" in found.problems[0]


def test_a_part_that_is_never_used_may_be_anywhere(flux3):
    """FLUX.3 has a language model that writes longer prompts."""
    for name in ("prompt_upsampler", "prompt_upsampler_processor"):
        change(flux3, name, loads_from("transformers.AutoProcessor", "Qwen/Qwen3.5-9B"))
    assert inspect_path(flux3).facts["can_be_ported"]
    pipeline = load_pipeline(flux3, family=FAMILIES["flux3"])
    assert pipeline.text_encoder is not None and pipeline.prompt_upsampler is None
    with pytest.raises(BadData, match=r"takes it from Qwen/Qwen3\.5-9B, and nothing is downloaded"):
        load_pipeline(flux3)


def test_a_part_that_nobody_gave_is_none(flux3):
    change(flux3, "prompt_upsampler", loads_from("transformers.Qwen3VLModel", None))
    assert load_pipeline_parts(flux3, ["prompt_upsampler"]) == {"prompt_upsampler": None}


@pytest.mark.parametrize("kind", ["AutoProcessor", "AutoTokenizer"])
def test_a_processor_that_only_its_own_files_name_is_what_they_say(flux3, kind):
    change(flux3, "tokenizer", loads_from(f"transformers.{kind}", "owner/flux3", "tokenizer"))
    loaded = load_pipeline_parts(flux3, ["tokenizer"])["tokenizer"]
    expected = {"AutoProcessor": "Qwen3VLProcessor", "AutoTokenizer": "Qwen2Tokenizer"}
    assert type(loaded).__name__ == expected[kind]
    for path in (flux3 / "tokenizer").glob("*_config.json"):
        path.write_text("{}")
    with pytest.raises(BadData, match=r"tokenizer: no `.*_class` in .*_config\.json, so it cannot"):
        load_pipeline_parts(flux3, ["tokenizer"])


def test_a_scheduler_that_the_pipeline_makes_itself_has_its_shift(flux3):
    assert not (flux3 / "scheduler").exists()
    own = third_party.library("diffusers").Flux3ModularPipeline().scheduler.config["shift"]
    assert base_shift_of(DiffusersFolder(flux3), FAMILIES["flux3"], 4096) == own == 6.93
