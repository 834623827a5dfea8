"""The demo's own parts; `make demo` runs the whole of it, with its gates."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

from asymlift.cli import app
from asymlift.data.buckets import Fit
from asymlift.data.catalog import open_catalog
from asymlift.data.reader import Reader
from asymlift.embedded.metrics import Scores
from asymlift.embedded.scenes import make_scenes
from asymlift.errors import CannotWrite, Exit
from asymlift.recipe import load_recipe
from asymlift.stages import demo as stage
from asymlift.stages.demo import REAL, ROWS, DemoReport, Gate, check_gates, make_data, recipe_file

FIT = Fit((32,), 8)

WORDS = dict.fromkeys(("shape", "texture", "foreground", "background", "letter"), 0.5)
SCORES = Scores(100.0, 0.5, WORDS, 0.4, 3.0)


def scores(base: Scores, tuned: Scores) -> dict[str, Scores]:
    return {ROWS["base"]: base, ROWS["lifted"]: base, ROWS["ema"]: tuned}


class Basis:
    r2 = 0.7


class Conversion:
    class coupling:  # noqa: N801
        psnr = 140.0


def test_the_gates_are_kept_only_by_a_model_that_beats_its_base():
    sharper = WORDS | {"texture": 0.8}
    good = replace(SCORES, frechet=49.0, accuracy_of=sharper)
    cases = {
        "all": (good, 0.7, 140.0, [True, True, True, True]),
        "distance": (replace(good, frechet=51.0), 0.7, 140.0, [True, True, False, True]),
        "texture": (replace(good, accuracy_of=WORDS), 0.7, 140.0, [True, True, True, False]),
        "basis": (good, 0.59, 140.0, [True, False, True, True]),
        "parity": (good, 0.7, 99.0, [False, True, True, True]),
    }
    for tuned, r2, psnr, kept in cases.values():
        basis, conversion = Basis(), Conversion()
        basis.r2, conversion.coupling.psnr = r2, psnr
        gates = check_gates(basis, conversion, scores(SCORES, tuned))
        assert [gate.kept for gate in gates] == kept
        honest = check_gates(basis, conversion, scores(SCORES, tuned), beats_its_base=False)
        assert [gate.kept for gate in honest] == kept[:2]


@pytest.mark.parametrize(("kept", "code"), [(True, Exit.DONE), (False, Exit.UNEXPECTED)])
def test_a_broken_gate_fails_the_command(monkeypatch, tmp_path, kept, code):
    rows = {REAL: SCORES, **scores(SCORES, SCORES)}
    gate = Gate("beats its base", "1 against 2", kept)
    report = DemoReport(tmp_path, tmp_path / "report.html", rows, [gate], {"sample": 1.0})
    monkeypatch.setattr(stage, "demo", lambda out, model: report)

    result = CliRunner().invoke(app, ["demo", "--out", str(tmp_path)])

    assert result.exit_code == code
    said = result.output
    assert ("BROKEN beats its base" in said) == (not kept)
    document = json.loads(CliRunner().invoke(app, ["demo", "--json"]).stdout)
    assert document["gates"][0]["kept"] == kept


@pytest.fixture
def recipe(monkeypatch, tmp_path):
    monkeypatch.setattr(stage, "PARTS", {"train": (0, 6), "validation": (1, 2)})
    return load_recipe(recipe_file("tiny.yaml"), ["prepare.shard_samples=3"])


def test_shards_are_prepared_from_a_folder_of_the_scenes_that_their_keys_name(recipe, tmp_path):
    make_data(recipe, tmp_path)
    catalog = open_catalog([tmp_path / "shards" / "train", tmp_path / "shards" / "validation"], FIT)
    keys = list(catalog.keys())
    assert sorted(keys) == [*(f"0-{i:06d}" for i in range(6)), "1-000000", "1-000001"]
    suffixes = {".png", ".txt", ".json", ".latent.safetensors", ".text.safetensors"}
    assert all(set(sample.parts) == suffixes for sample in catalog)
    read = Reader().read(catalog[keys.index("0-000004")])
    assert read.latent.dtype == torch.float16
    assert all(tensor.dtype == torch.float16 for tensor in read.text.values())
    real = make_scenes([4], seed=0, size=32)
    assert read.caption == real.captions[0]
    assert torch.equal(read.image, (real.image[0] * 255).round().to(torch.uint8))


def test_a_second_demo_finds_its_data_done(recipe, tmp_path):
    make_data(recipe, tmp_path)
    before = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*.*")}
    assert all(report.already_done for report in make_data(recipe, tmp_path))
    assert {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*.*")} == before


def test_a_folder_of_another_run_is_named_with_the_way_out(monkeypatch, tmp_path):
    def refuse(recipe: object, out: Path, model: str) -> None:
        raise CannotWrite("a basis of other data is here")

    monkeypatch.setattr(stage, "run_all", refuse)

    with pytest.raises(CannotWrite, match=f"To begin anew, remove {tmp_path}, or choose another"):
        stage.demo(tmp_path)
