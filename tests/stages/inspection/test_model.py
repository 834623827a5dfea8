"""`inspect` names what it is given, with its key numbers, and loads no model for it."""

import dataclasses
import json
import os

import pytest
import torch
from safetensors.torch import save_file

from asymlift.artifacts.basis_file import Basis, save_basis
from asymlift.artifacts.checkpoint import committing
from asymlift.artifacts.diffusers_folder import DiffusersFolder
from asymlift.errors import BadData
from asymlift.families import FAMILIES
from asymlift.maths.color import ColorCode
from asymlift.runtime import third_party
from asymlift.stages.convert import ConvertPlan, convert
from asymlift.stages.inspection.model import inspect_path
from tests import tiny
from tests.families.case import case_of

RECIPE = """
name: my-port
runs: {runs}
model: {{base: models/base}}
data: {{train: "shards/{{000..119}}.tar"}}
finetune:
  steps: 70
  train: {{lora: {{rank: 16}}, modules: [first, last]}}
"""


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A run folder with a basis, a lifted model, a checkpoint and metrics; and its base."""
    root = tmp_path_factory.mktemp("inspect")
    base = tiny.write_pipeline(root / "base", "flux2")
    folder = root / "my-port"
    folder.mkdir()
    geometry = tiny.tiny_geometry("flux2")
    basis = Basis(
        A=tiny.random_basis(geometry).float(),
        s=1.75,
        patch=8,
        method="procrustes",
        family="flux2",
        color=ColorCode("rgb", (0.4, 0.5, 0.6), 0.25),
        num_images=128,
        alignment={"r2": 0.71, "captured": 0.8},
        vae_fingerprint=DiffusersFolder(base).fingerprint("vae"),
    )
    save_basis(folder / "basis.safetensors", basis)
    convert(
        ConvertPlan(
            base=base,
            basis=folder / "basis.safetensors",
            output=folder / "lifted",
            family=FAMILIES["flux2"],
            verify="maps",
        )
    )
    state = {
        "lora": {"rank": 2, "alpha": 4.0},
        "samples": 8000,
        "parameters": [["proj_out.weight", [4, 4], "last"], ["a.lora_A.weight", [2, 4], "lora"]],
        "fingerprints": {"lifted": "sha256:0123456789abcdef"},
    }
    trained = {
        "proj_out.weight": torch.ones(192, 32),
        "a.lora_A.weight": torch.ones(2, 32),
        "a.lora_B.weight": torch.ones(32, 2),
    }
    with committing(folder / "checkpoints", 250, state) as staged:
        save_file(trained, staged / "trainable.safetensors")
        save_file(trained, staged / "ema.safetensors")
    lines = [{"step": step, "loss": 0.5 / step, "lr": 1e-4} for step in (249, 250)]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return folder


@pytest.fixture(autouse=True)
def no_libraries(run, monkeypatch):
    """Nothing here may load diffusers or transformers: an answer takes no time."""

    def refuse(name):
        raise AssertionError(f"{name} was asked for")

    monkeypatch.setattr(third_party, "library", refuse)


def rows_of(path):
    found = inspect_path(path)
    assert found.problems == []
    json.dumps(found.facts)
    return dict(found.rows)


def test_a_recipe(tmp_path):
    path = tmp_path / "recipe.yaml"
    path.write_text(RECIPE.format(runs=tmp_path))
    (tmp_path / "my-port").mkdir()
    (tmp_path / "my-port" / "basis.safetensors").touch()
    found = inspect_path(path)
    rows = dict(found.rows)
    assert (found.kind, found.title) == ("recipe", "my-port")
    assert rows["trains"] == "LoRA of rank 16, first, last"
    assert rows["training"].startswith("70 steps of 256, variance_reduced")
    assert rows["run folder"] == f"{tmp_path / 'my-port'}: fit-basis done"
    assert found.facts["recipe"]["finetune"]["steps"] == 70


def test_a_basis(run):
    rows = rows_of(run / "basis.safetensors")
    assert rows["subspace"] == "rank 16 of 192: patches of 8 pixels, c p q"
    assert rows["scale"] == "1.75"
    assert rows["method"] == "procrustes, 128 images"
    assert rows["colour"] == "rgb, mean (0.4, 0.5, 0.6), std 0.25"
    assert rows["held-out r2"] == "0.7100"
    facts = inspect_path(run / "basis.safetensors").facts
    assert (facts["D"], facts["rank"], facts["family"]) == (192, 16, "flux2")


def test_a_basis_that_says_little_or_fits_badly(tmp_path):
    A = torch.linalg.qr(torch.randn(192, 16))[0].contiguous()
    save_file({"proj_mat_p8": A, "scale_p8": torch.tensor(2.0)}, tmp_path / "b.safetensors")
    found = inspect_path(tmp_path / "b.safetensors")
    assert found.kind == "basis"
    assert dict(found.rows)["family"] == "not said"
    assert "it does not say the model family" in found.problems[0]

    poor = Basis(A, 2.0, 8, alignment={"r2": -0.4})
    save_basis(tmp_path / "poor.safetensors", poor)
    problems = inspect_path(tmp_path / "poor.safetensors").problems
    assert any("R2 is -0.400, poor" in problem for problem in problems)


@pytest.mark.parametrize("name", FAMILIES)
def test_a_base_of_every_family(name, tmp_path, monkeypatch):
    monkeypatch.undo()
    path = tiny.write_pipeline(tmp_path / "base", name)
    net = tiny.tiny_transformer(name)
    monkeypatch.setattr(third_party, "library", lambda name: pytest.fail(name))

    found = inspect_path(path)

    rows, family = dict(found.rows), FAMILIES[name]
    assert found.kind == "diffusers folder"
    assert found.title == family.pipelines[0]
    assert rows["can be ported"] == f"yes, as family {name}"
    assert rows["token order"] == f"{family.order_in} in, {family.order_out} out"
    sizes = case_of(name).sizes
    p = sizes.pixel_patch
    assert rows["tokens"].startswith(f"{p} x {p} pixels: {sizes.D} numbers; {sizes.d} in latents")
    component = found.facts["components"]["transformer"]
    assert component["class"] == family.transformer
    assert component["num_parameters"] == sum(t.numel() for t in net.state_dict().values())
    assert "F32" in rows["transformer"]


def test_a_base_that_cannot_be_ported_says_why(run, tmp_path):
    base = tmp_path / "base"
    (base / "transformer").mkdir(parents=True)
    (base / "vae").mkdir()
    index = {"transformer": ["diffusers", "PixArtTransformer2DModel"], "vae": ["diffusers", "X"]}
    (base / "model_index.json").write_text(json.dumps({"_class_name": "PixArtPipeline", **index}))
    config = {"_class_name": "PixArtTransformer2DModel"}
    (base / "transformer" / "config.json").write_text(json.dumps(config))
    (base / "transformer" / "diffusion_pytorch_model.bin").touch()

    found = inspect_path(base)

    assert dict(found.rows)["can be ported"] == "no"
    assert found.facts["can_be_ported"] is False
    assert any("pickle" in problem for problem in found.problems)
    assert any("transformer is a PixArtTransformer2DModel, which" in p for p in found.problems)


def test_a_lifted_model(run):
    rows = rows_of(run / "lifted")
    assert rows["scale"] == "1.75"
    assert rows["family"] == "flux2"
    assert rows["time shift at 1024 x 1024"].endswith("in pixels")
    assert rows["made from base transformer"].startswith("sha256:")
    assert rows["verified, maps"].startswith("first ")
    assert inspect_path(run / "lifted").kind == "lifted model"


def test_a_checkpoint(run):
    path = run / "checkpoints" / "step-000250"
    found = inspect_path(path)
    rows = rows_of(path)
    assert (found.kind, found.title) == ("checkpoint", "step 250")
    assert rows["step"] == "250, 8000 samples seen"
    assert rows["trained whole"] == "6.14 k numbers: proj_out"
    assert rows["trained by LoRA"] == "128 numbers: 1 x rank 2, alpha 4"
    assert rows["average"] == "kept"
    assert rows["trained from lifted"] == "sha256:0123456789ab..."
    assert found.facts["num_trained"] == 192 * 32 + 2 * 2 * 32


def test_a_checkpoint_with_a_file_missing(run, tmp_path):
    with committing(tmp_path, 1, {}) as staged:
        save_file({"w": torch.zeros(2)}, staged / "trainable.safetensors")
    (tmp_path / "step-000001" / "trainable.safetensors").unlink()
    assert inspect_path(tmp_path / "step-000001").problems == ["trainable.safetensors: missing"]


def test_a_run(run):
    rows = rows_of(run)
    assert "rank 16 of 192" in rows["basis.safetensors"]
    assert rows["lifted"].startswith("flux2")
    assert rows["checkpoints"] == "step 250"
    assert rows["last step"] == "step 250, loss 0.002, lr 0.0001"
    assert inspect_path(run).facts["checkpoints"] == [250]


def test_samples_that_are_not_finished(tmp_path):
    index = {
        "complete": False,
        "facts": {"seed": 3, "settings": {"solver": "unipc"}},
        "pictures": [{"file": "00000-ema.png", "weights": "ema"}],
    }
    (tmp_path / "index.json").write_text(json.dumps(index))
    found = inspect_path(tmp_path)
    rows = dict(found.rows)
    assert (rows["pictures"], rows["weights"], rows["seed"]) == ("1", "ema (1)", "3")
    assert rows["settings"] == "solver unipc"
    assert found.problems[0] == "00000-ema.png: missing"
    assert found.problems[1].startswith("not finished")


def test_other_tensors(tmp_path):
    save_file(
        {"w": torch.zeros(1000, 1234), "b": torch.zeros(4).half()}, tmp_path / "x.safetensors"
    )
    rows = rows_of(tmp_path / "x.safetensors")
    assert rows["tensors"] == "2: w, b"
    assert rows["numbers"] == "1.23 M, F32, F16"


def test_only_training_data_have_pictures_to_show(run, tmp_path):
    with pytest.raises(BadData, match="a basis; only shards, folders and tables have pictures"):
        inspect_path(run / "basis.safetensors", tmp_path / "sheet.png")


def test_what_is_unknown_is_told_what_is_known(tmp_path, run):
    (tmp_path / "notes.txt").touch()
    (tmp_path / "empty").mkdir()
    for path in (tmp_path / "notes.txt", tmp_path / "empty"):
        with pytest.raises(BadData, match=r"unknown; known are a recipe \(.yaml\)"):
            inspect_path(path)
    with pytest.raises(BadData, match="there is no such file or folder"):
        inspect_path(tmp_path / "nothing")
    with pytest.raises(BadData, match=r"a component of the model in .*base: give that folder"):
        inspect_path(run.parent / "base" / "transformer")


@pytest.mark.parametrize(
    ("file", "content"),
    [
        ("index.json", {"pictures": [1]}),
        ("index.json", {"pictures": [{"file": "a"}]}),
        ("model_index.json", [1]),
        ("transformer/asymlift.json", {"geometry": 1}),
        ("state.json", {}),
    ],
)
def test_json_of_another_shape_is_bad_data(tmp_path, file, content):
    (tmp_path / file).parent.mkdir(exist_ok=True)
    (tmp_path / file).write_text(json.dumps(content))
    with pytest.raises(BadData):
        inspect_path(tmp_path)


def test_huge_weights_are_not_read(tmp_path):
    """A sparse file of 40 GB takes as long as one of 4 bytes."""
    path = tmp_path / "big.safetensors"
    size = 40 * 2**30
    header = json.dumps({"w": {"dtype": "BF16", "shape": [size // 2], "data_offsets": [0, size]}})
    with path.open("wb") as file:
        file.write(len(header).to_bytes(8, "little") + header.encode())
        os.truncate(file.fileno(), 8 + len(header) + size)
    assert rows_of(path)["numbers"] == "21.5 B, BF16"


def test_rows_are_what_people_read_and_facts_what_programs_read(run):
    found = inspect_path(run / "basis.safetensors")
    assert all(isinstance(text, str) for row in found.rows for text in row)
    assert json.loads(json.dumps(dataclasses.asdict(found)))["kind"] == "basis"
