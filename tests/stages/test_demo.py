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
from asymlift.data.table import index_path
from asymlift.embedded.metrics import Scores
from asymlift.embedded.scenes import make_scenes
from asymlift.errors import CannotWrite, Exit
from asymlift.stages import demo as stage
from asymlift.stages.demo import REAL, ROWS, DemoReport, Gate, check_gates, write_shards

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
def shards(monkeypatch, tmp_path):
    monkeypatch.setattr(stage, "SHARD_SAMPLES", 3)
    monkeypatch.setattr(stage, "VALIDATION_SAMPLES", 2)
    monkeypatch.setattr(stage, "TRAIN_SHARDS", 2)
    write_shards(tmp_path)
    return sorted(tmp_path.rglob("*.tar"))


def test_shards_have_every_member_and_the_scenes_that_their_keys_name(shards, tmp_path):
    samples = list(open_catalog(shards, Fit((32,), 8)))
    keys = [sample.key for sample in samples]
    assert sorted(keys) == [*(f"0-{i:06d}" for i in range(6)), "1-000000", "1-000001"]
    suffixes = {".png", ".txt", ".json", ".latent.safetensors", ".text.safetensors"}
    assert all(set(sample.parts) == suffixes for sample in samples)
    assert all(sample.target == (32, 32) for sample in samples)
    read = Reader().read(samples[keys.index("0-000004")])
    assert read.latent.dtype == torch.float16
    assert all(tensor.dtype == torch.float16 for tensor in read.text.values())
    real = make_scenes([4], seed=0, size=32)
    assert read.caption == real.captions[0]
    assert torch.equal(read.image, (real.image[0] * 255).round().to(torch.uint8))
    before = [shard.stat().st_mtime_ns for shard in shards]
    write_shards(tmp_path)
    assert [shard.stat().st_mtime_ns for shard in shards] == before


def test_shards_say_what_they_were_made_with_and_are_made_again_for_another_model(shards, tmp_path):
    made = open_catalog(shards, Fit((32,), 8)).made
    assert {"family", "vae", "text encoders"} < made.keys()
    assert (made["text length"], made["resize"]["sides"]) == (12, [32])
    index_path(shards[0]).unlink()  # as an older demo left them
    kept = shards[1].stat().st_mtime_ns
    write_shards(tmp_path)
    assert open_catalog(shards[:1], Fit((32,), 8)).made == made
    assert shards[1].stat().st_mtime_ns == kept
    write_shards(tmp_path, stage.GOOD)
    assert open_catalog(shards, Fit((32,), 8)).made["vae"] != made["vae"]


def test_a_folder_of_another_run_is_named_with_the_way_out(monkeypatch, tmp_path):
    def refuse(recipe: object, out: Path, model: str) -> None:
        raise CannotWrite("a basis of other data is here")

    monkeypatch.setattr(stage, "run_all", refuse)

    with pytest.raises(CannotWrite, match=f"To begin anew, remove {tmp_path}, or choose another"):
        stage.demo(tmp_path)
