"""The lifted weights and folder: what changes, what must not, what is refused."""

import json

import pytest
import torch
from torch.testing import assert_close

from asymlift.artifacts.diffusers_folder import DiffusersFolder
from asymlift.artifacts.lifted_folder import FACTS, TENSORS, read_lifted
from asymlift.artifacts.lifted_weights import LiftedWeights
from asymlift.artifacts.manifest import write_manifest
from asymlift.artifacts.safetensors_stream import TensorInfo, load_tensors, save_tensors
from asymlift.errors import BadData
from asymlift.families import FAMILIES
from asymlift.families.base import Geometry
from asymlift.maths.basis import random_basis
from asymlift.maths.color import ColorCode
from asymlift.stages.convert import convert
from tests.reliability.fake_pipeline import SECOND, fake_plan, write_base

GEOMETRY = Geometry(2, 2, 2)  # p = 4, d = 8, D = 48, C' = 12
WEIGHTS = "diffusion_pytorch_model.safetensors"


def basis(seed=0):
    return random_basis(48, 8, torch.Generator().manual_seed(seed)).float()


def weights_of(tmp_path, family, tensors):
    folder = write_base(tmp_path / "base", shards=1)
    save_tensors(folder / "transformer" / WEIGHTS, tensors)
    return LiftedWeights.of(DiffusersFolder(folder), FAMILIES[family], GEOMETRY, basis())


def test_a_convolution_with_biases_is_lifted_too(tmp_path):
    """SD3 reads with a convolution and writes channels last; both maps have a bias."""
    tensors = {
        "pos_embed.proj.weight": torch.randn(5, 2, 2, 2).bfloat16(),
        "pos_embed.proj.bias": torch.randn(5).bfloat16(),
        "block.weight": torch.randn(3, 3).bfloat16(),
        "proj_out.weight": torch.randn(8, 5).bfloat16(),
        "proj_out.bias": torch.randn(8).bfloat16(),
    }
    weights = weights_of(tmp_path, "sd3", tensors)
    (path,) = weights.headers
    weights.writer_of(path)(tmp_path / "out")
    out = load_tensors(tmp_path / "out")

    assert out.keys() == tensors.keys()
    assert torch.equal(out["block.weight"], tensors["block.weight"])
    assert {name: tuple(out[name].shape) for name in weights.changed} == {
        "pos_embed.proj.weight": (5, 12, 2, 2),
        "pos_embed.proj.bias": (5,),
        "proj_out.weight": (48, 5),
        "proj_out.bias": (48,),
    }
    assert {out[name].dtype for name in weights.changed} == {torch.float32}
    old_first = tensors["pos_embed.proj.weight"].flatten(1).float()
    assert_close(out["pos_embed.proj.weight"].flatten(1) @ basis(), old_first)
    assert torch.equal(out["pos_embed.proj.bias"], tensors["pos_embed.proj.bias"].float())
    assert weights.num_bytes(path) == (tmp_path / "out").stat().st_size


def test_extra_input_channels_stay_and_extra_output_channels_go(tmp_path):
    tensors = {
        "pos_embed.proj.weight": torch.randn(5, 3, 2, 2),
        "proj_out.weight": torch.randn(16, 5),
    }
    weights = weights_of(tmp_path, "sd3", tensors)
    assert weights.changed == {
        "pos_embed.proj.weight": TensorInfo("F32", (5, 13, 2, 2)),
        "proj_out.weight": TensorInfo("F32", (48, 5)),
    }


@pytest.mark.parametrize(
    ("tensors", "message"),
    [
        ({"proj_out.weight": torch.zeros(8, 5)}, r"no tensor x_embedder\.weight"),
        ({"x_embedder.weight": torch.zeros(5, 8)}, r"no tensor proj_out\.weight"),
        (
            {"x_embedder.weight": torch.zeros(5, 7), "proj_out.weight": torch.zeros(8, 5)},
            r"x_embedder\.weight has shape \(5, 7\).* tokens of 8 numbers",
        ),
        (
            {"x_embedder.weight": torch.zeros(5, 8), "proj_out.weight": torch.zeros(6, 5)},
            r"proj_out\.weight has shape \(6, 5\)",
        ),
        (
            {
                "x_embedder.weight": torch.zeros(5, 8).to(torch.float8_e4m3fn),
                "proj_out.weight": torch.zeros(8, 5),
            },
            r"x_embedder\.weight is stored as F8_E4M3\. A quantised map cannot be lifted",
        ),
    ],
)
def test_maps_that_cannot_be_lifted_are_named(tensors, message, tmp_path):
    with pytest.raises(BadData, match=message):
        weights_of(tmp_path, "flux2", tensors)


def test_infinite_maps_are_not_written(tmp_path):
    broken = torch.full((8, 5), float("inf"))
    tensors = {"x_embedder.weight": torch.zeros(5, 8), "proj_out.weight": broken}
    weights = weights_of(tmp_path, "flux2", tensors)
    (path,) = weights.headers
    with pytest.raises(BadData, match=r"proj_out\.weight holds NaN or infinity"):
        weights.writer_of(path)(tmp_path / "out")
    assert not list(tmp_path.glob("out*"))


def test_the_config_changes_in_its_channels_only_and_keeps_its_style(tmp_path):
    folder = write_base(tmp_path / "base")
    path = folder / "transformer/config.json"
    path.write_text('{\n    "out_channels": 8,\n    "z": [1],\n    "in_channels": 8\n}')
    weights = LiftedWeights.of(DiffusersFolder(folder), FAMILIES["flux2"], GEOMETRY, basis())
    text = weights.config().decode()
    assert json.loads(text) == {"out_channels": None, "z": [1], "in_channels": 48}
    assert text.startswith('{\n    "out_channels": null,\n')
    assert text.endswith('"in_channels": 48\n}')


@pytest.fixture
def plan(tmp_path):
    plan = fake_plan(tmp_path)
    convert(plan)
    return plan


def test_a_lifted_folder_says_what_it_is(plan):
    lifted = read_lifted(plan.output)
    assert lifted.family == "flux2"
    assert lifted.geometry == GEOMETRY
    assert torch.equal(lifted.A, basis())
    assert lifted.s == pytest.approx(0.7, rel=1e-7)
    assert lifted.color == ColorCode("oklab", (0.56, 0.0, 0.01), 0.16)
    assert lifted.fingerprints["vae"] == DiffusersFolder(plan.base).fingerprint("vae")
    assert lifted.fingerprints["vae"] == DiffusersFolder(plan.output).fingerprint("vae")


def test_a_second_network_belongs_to_a_lifted_folder(tmp_path):
    plan = fake_plan(tmp_path, second=True)
    convert(plan)
    assert read_lifted(plan.output).networks == ("transformer", SECOND)
    (plan.output / SECOND / "config.json").write_text("{}")
    with pytest.raises(BadData, match=rf"{SECOND}/config\.json: its bytes have changed"):
        read_lifted(plan.output)


def test_a_network_that_leads_out_of_the_folder_is_refused(plan):
    facts = json.loads((plan.output / FACTS).read_bytes())
    facts["networks"].append("../../other")
    (plan.output / FACTS).write_text(json.dumps(facts))
    (plan.output / "manifest.json").unlink()
    write_manifest(plan.output, kind="lifted", facts={})
    with pytest.raises(BadData, match=r"'\.\./\.\./other' is no plain folder name"):
        read_lifted(plan.output)


@pytest.mark.parametrize(
    ("name", "value", "said"),
    [
        ("fingerprints", [], "fingerprints are no texts by name"),
        ("fingerprints", [[1, 2]], "fingerprints are no texts by name"),
        ("fingerprints", {"vae": 5}, "fingerprints are no texts by name"),
        ("verification", ["x"], "verification is no object"),
        ("networks", {"transformer": 1}, "no list with 'transformer'"),
        ("networks", ["other"], "no list with 'transformer'"),
        ("networks", ["transformer", 5], "5 is no plain folder name"),
        ("networks", ..., "KeyError: 'networks'"),
    ],
)
def test_facts_of_a_wrong_kind_are_refused_under_a_manifest_that_fits(name, value, said, plan):
    facts = json.loads((plan.output / FACTS).read_bytes()) | {name: value}
    kept = {key: value for key, value in facts.items() if value is not ...}
    (plan.output / FACTS).write_text(json.dumps(kept))
    (plan.output / "manifest.json").unlink()
    write_manifest(plan.output, kind="lifted", facts={})
    with pytest.raises(BadData, match=rf"asymlift\.json: not as convert writes it \(.*{said}"):
        read_lifted(plan.output)


def test_a_damaged_lifted_folder_does_not_load(plan):
    for name in (FACTS, TENSORS, "transformer/config.json", "manifest.json"):
        path = plan.output / name
        good = path.read_bytes()
        path.write_bytes(good[:-3] + b"x" + good[-2:])
        with pytest.raises(BadData, match=path.name):
            read_lifted(plan.output)
        path.unlink()
        with pytest.raises(BadData, match=path.name):
            read_lifted(plan.output)
        path.write_bytes(good)
    assert read_lifted(plan.output)
