"""The validation loss depends on the weights alone: not on repetition, ranks, ZeRO or the past."""

import json
import math
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from asymlift.data.records import Sample
from asymlift.data.writer import write_shard
from asymlift.embedded.scenes import make_scenes
from asymlift.errors import BadData, BadRecipe, StoppedEarly, Unavailable
from asymlift.recipe import load_recipe
from asymlift.runtime import trackers
from asymlift.runtime.dist import Ranks
from asymlift.runtime.metrics import read_metrics, write_lines
from asymlift.stages.finetune.run import finetune
from asymlift.stages.finetune.step import Trainer
from tests.stages.small_run import LORA, another_run, build, drive, encoded

ALONE = Ranks(0, 1, 0)
KEYS = ("validation_loss", "validation_by_level", "validation_perceptual")
FEW, EVERY = "finetune.steps=3", "finetune.validation={every: 2, samples: 5, levels: 5}"


@pytest.fixture(scope="module")
def recipe(tmp_path_factory) -> Path:
    """With ten held-out samples, of which one has no embedding, one a size of its own."""
    path = build(tmp_path_factory.mktemp("runs"))
    scenes = make_scenes(range(100, 110), seed=3, size=32)
    samples = list(encoded(scenes, [f"held-{number}" for number in range(10)]))
    samples[2].text = None
    first = samples[3]
    wide = torch.cat([first.image, first.image], dim=2)
    samples[3] = Sample("held-wide", wide, first.caption, text=first.text)
    write_shard(path.parent / "held" / "000000.tar", samples)
    return path


def validated(recipe: Path, name: str, *overrides: str) -> list[str]:
    held = f"data.validation={recipe.parent}/held/000000.tar"
    resize = "data.resize={sides: [32], step: 8}"  # of what has no cached latent
    return [another_run(recipe, name), held, resize, EVERY, FEW, *overrides]


def numbers(recipe: Path, name: str) -> dict[int, list]:
    lines = read_metrics(recipe.parent / name / "metrics.jsonl")
    return {
        line["step"]: [line[key] for key in KEYS] for line in lines if "validation_loss" in line
    }


def flat(found: dict[int, list]) -> list[float]:
    return [n for loss, levels, other in found.values() for n in (loss, *levels, other)]


@pytest.fixture(scope="module")
def alone(recipe):
    """One that computes more at once, one without validation, one that is cut and resumed."""
    jobs = {
        "first": validated(recipe, "first"),
        "again": validated(recipe, "again", "finetune.micro_batch=8"),
        "without": [another_run(recipe, "without"), FEW],
        "half": validated(recipe, "cut", "finetune.steps=2"),
        "cut": validated(recipe, "cut"),
        "lora": validated(recipe, "lora", *LORA, "finetune.precision=float32"),
    }
    results, codes, said = drive(recipe, list(jobs.values()))
    assert codes == [0], said[0]
    return dict(zip(jobs, results, strict=True))


@pytest.fixture(scope="module")
def pair(recipe):
    jobs = [
        validated(recipe, "pair-3", "finetune.zero.stage=3"),
        validated(
            recipe, "pair-lora", *LORA, "finetune.precision=float32", "finetune.zero.stage=3"
        ),
    ]
    _, codes, said = drive(recipe, jobs, ranks=2)
    assert codes == [0, 0], said


def test_it_is_measured_before_the_first_step_then_every_few_and_at_the_end(recipe, alone):
    found = numbers(recipe, "first")
    assert list(found) == [0, 2, 3]
    lines = read_metrics(recipe.parent / "first" / "metrics.jsonl")
    assert [line["step"] for line in lines] == [0, 1, 2, 3]
    assert "loss" not in lines[0] and "loss" in lines[2]
    for loss, levels, perceptual in found.values():
        assert len(levels) == 5
        assert loss == pytest.approx(sum(levels) / 5, rel=1e-12)
        assert 0 < perceptual < math.inf
    assert lines[2]["validation_sigma"] == lines[0]["validation_sigma"]
    assert lines[0]["validation_sigma"] == sorted(lines[0]["validation_sigma"])


def test_the_levels_are_the_middles_of_equal_shares_of_the_recipes_own(recipe, alone):
    """Logit-normal, shifted by 4: sigma = 4 t / (1 + 3 t) at the quantiles 0.1, 0.3, ... of t."""
    line = read_metrics(recipe.parent / "first" / "metrics.jsonl")[0]
    normal = torch.special.ndtri(torch.tensor([0.1, 0.3, 0.5, 0.7, 0.9]))
    t = torch.sigmoid(normal)
    assert line["validation_sigma"] == pytest.approx((4 * t / (1 + 3 * t)).tolist(), abs=1e-4)


def test_training_does_not_notice_that_it_is_watched(alone):
    assert alone["without"]["digests"] == alone["first"]["digests"]


def test_a_resumed_run_goes_on_with_the_same_numbers_and_measures_no_step_twice(recipe, alone):
    """Bit for bit, and so it is when the same weights are measured again."""
    assert alone["cut"]["resumed_from"] == 2
    assert numbers(recipe, "cut") == numbers(recipe, "first")
    steps = [line["step"] for line in read_metrics(recipe.parent / "cut" / "metrics.jsonl")]
    assert steps == [0, 1, 2, 3]


def test_what_a_stop_leaves_out_of_its_step_is_made_up_for_first(recipe, alone, monkeypatch):
    """A stop saves at once; the run that goes on measures and shows that step before the next."""
    gradients = Trainer.gradients

    def asked_to_stop(self: Trainer, step: int, *rest: Any) -> Any:
        if step == 1:
            rest[-1].reason = "SIGTERM"
        return gradients(self, step, *rest)

    preview = "finetune.preview={every: 2, prompts: [a red disc], steps: 2}"
    use = load_recipe(recipe, validated(recipe, "stopped", preview))
    folder = recipe.parent / "stopped"
    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "gradients", asked_to_stop)
        with pytest.raises(StoppedEarly, match="after step 2 of 3"):
            finetune(use, ALONE)
    assert list(numbers(recipe, "stopped")) == [0]
    assert not (folder / "samples" / "step-000002").exists()

    with monkeypatch.context() as patch:  # killed as soon as it is made up for
        patch.setattr(Trainer, "take", lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            finetune(use, ALONE)
    grid = (folder / "samples" / "step-000002" / "grid.png").read_bytes()
    assert finetune(use, ALONE).resumed_from == 2

    assert numbers(recipe, "stopped") == numbers(recipe, "first")
    lines = read_metrics(folder / "metrics.jsonl")
    assert [line["step"] for line in lines] == [0, 1, 2, 3] and "loss" in lines[2]
    assert (folder / "samples" / "step-000002" / "grid.png").read_bytes() == grid

    write_lines(folder / "metrics.jsonl", [line for line in lines if line["step"] < 3])
    assert finetune(use, ALONE).resumed_from == 3  # the last step has to be measured, too
    assert numbers(recipe, "stopped") == numbers(recipe, "first")


def test_on_two_ranks_under_zero_3_the_numbers_are_the_same(recipe, alone, pair):
    """Five samples on two ranks: one of them computes a sixth time, and that counts for nothing."""
    assert flat(numbers(recipe, "pair-3")) == pytest.approx(
        flat(numbers(recipe, "first")), rel=1e-4
    )
    for two, one in (("pair-3", "first"), ("pair-lora", "lora")):
        before = (flat({0: numbers(recipe, name)[0]}) for name in (one, two))
        assert next(before) == pytest.approx(next(before), rel=1e-6)


def test_it_does_not_depend_on_how_many_are_computed_at_once(recipe, alone):
    assert flat(numbers(recipe, "again")) == pytest.approx(flat(numbers(recipe, "first")), rel=1e-4)


def test_adapters_start_from_the_very_model_that_a_full_run_starts_from(recipe, alone):
    """Adapters begin at zero, and their dropout is off."""
    lora, full = (flat({0: numbers(recipe, name)[0]}) for name in ("lora", "first"))
    assert lora == pytest.approx(full, rel=1e-5)


def test_the_average_is_what_is_measured(recipe, alone):
    """With an average that stays at the start, so does the loss."""
    frozen = "finetune.ema={kind: constant, decay: 0.9999999, from_step: 0}"
    finetune(load_recipe(recipe, validated(recipe, "average", frozen)), ALONE)
    raw = validated(recipe, "raw", "finetune.ema=null")
    finetune(load_recipe(recipe, raw), ALONE)
    average, weights = numbers(recipe, "average"), numbers(recipe, "raw")
    assert average[3][0] == pytest.approx(average[0][0], rel=1e-5)
    assert weights[3][0] != pytest.approx(average[0][0], rel=1e-4)
    assert weights[0] == average[0]


# ---- what is refused, and what is said -----------------------------------------------------------


def test_validation_without_samples_is_a_bad_recipe(recipe):
    with pytest.raises(BadRecipe, match=r"finetune\.validation needs data\.validation: samples"):
        load_recipe(recipe, [EVERY])


def test_what_is_trained_on_is_not_held_out(recipe):
    shard = recipe.parent / "shards" / "000001.tar"
    use = load_recipe(recipe, [*validated(recipe, "both"), f"data.validation={shard}"])
    with pytest.raises(BadData, match=r"000001\.tar is in data\.train too; give it samples"):
        finetune(use, ALONE)


def test_equal_keys_and_few_or_broken_samples_are_said(recipe, tmp_path, capfd):
    held = tmp_path / "held.tar"
    shutil.copy(recipe.parent / "shards" / "000001.tar", held)
    data = held.read_bytes()
    at = data.index(b"IDAT")
    held.write_bytes(data[:at] + b"IDAX" + data[at + 4 :])  # one picture of 24
    more = ["data.max_bad_fraction=0.1", "finetune.steps=1", "finetune.loss.perceptual=null"]
    overrides = [*validated(recipe, "told", *more), f"data.validation={held}"]
    every = "finetune.validation={every: 2, samples: 40, levels: 1}"
    finetune(load_recipe(recipe, [*overrides, every]), ALONE)
    said = capfd.readouterr().err
    assert "data.validation: 24 keys are in data.train too (000024, 000025, 000026)" in said
    assert "validation: 1 samples left out" in said and "held.tar" in said
    assert "validation: 23 samples, finetune.validation asks for 40" in said
    [first, last] = read_metrics(recipe.parent / "told" / "metrics.jsonl")
    assert first.keys() == {"step", "validation_loss", "validation_by_level", "validation_sigma"}
    assert last["validation_loss"] > 0

    preview = "finetune.preview={every: 2, prompts: [a red disc], steps: 2}"
    finetune(load_recipe(recipe, [*overrides, every, preview, "finetune.steps=2"]), ALONE)
    samples = recipe.parent / "told" / "samples"
    lifted, now = (samples / name / "0000.png" for name in ("lifted", "step-000002"))
    assert lifted.read_bytes() != now.read_bytes()  # drawn before what was trained came back

    held.write_bytes(data.replace(b"IDAT", b"IDAX"))
    with pytest.raises(BadData, match=r"data\.validation: no sample can be used"):
        finetune(load_recipe(recipe, [another_run(recipe, "none"), *overrides[1:], every]), ALONE)


def test_a_tracker_that_is_missing_is_refused_before_anything_is_loaded(recipe, monkeypatch):
    monkeypatch.setattr(trackers, "find_spec", lambda name: None)
    use = load_recipe(recipe, [another_run(recipe, "no-board"), "finetune.trackers=[tensorboard]"])
    with pytest.raises(Unavailable, match=r"pip install 'asymlift\[tensorboard\]'"):
        finetune(use, ALONE)
    assert not (recipe.parent / "no-board" / "run.json").exists()


# ---- what a run shows --------------------------------------------------------------------------


def test_a_run_tells_all_of_it_in_its_folder(recipe, capfd):
    """Lines, page, tracker and run.json; and nothing on stdout."""
    preview = "finetune.preview={every: 2, prompts: [a red disc], steps: 2}"
    board = "finetune.trackers=[tensorboard]"
    use = load_recipe(recipe, validated(recipe, "told-all", preview, board))
    folder = recipe.parent / "told-all"
    (folder / "save_quit").touch()
    with pytest.raises(StoppedEarly):
        finetune(use, ALONE)
    assert "stopped by" in (folder / "report.html").read_text()
    report = finetune(use, ALONE)

    assert capfd.readouterr().out == ""
    assert report.last == {
        k: v for k, v in read_metrics(folder / "metrics.jsonl")[-1].items() if k != "step"
    }
    assert report.last["images_per_second"] == pytest.approx(8 / report.last["seconds"], rel=0.01)
    waited = report.last["seconds_waiting_for_data"]
    assert report.last["seconds_computing"] == pytest.approx(report.last["seconds"] - waited)
    assert report.last["seconds_to_go"] == 0 and report.last["peak_gib"] > 0.1
    page = (folder / "report.html").read_text()
    assert "finished, as of" in page and "step-000003" in page and "step-000000" in page
    assert "Validation loss" in page and "What ran" in page
    starts = json.loads((folder / "run.json").read_bytes())["commands"]
    assert [(start["command"], start["after_step"]) for start in starts] == [
        ("finetune", 0),
        ("finetune", 1),
    ]
    assert starts[0]["fingerprints"].keys() >= {"lifted", "data", "base", "vae", "basis"}
    assert load_recipe(folder / "config.yaml").finetune.steps == 3

    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    found = EventAccumulator(str(folder / "tensorboard"))
    found.Reload()
    assert [point.step for point in found.Scalars("loss")] == [1, 2, 3]
    assert [point.step for point in found.Scalars("validation_loss")] == [0, 2, 3]
    assert [picture.step for picture in found.Images("preview")] == [0, 2, 3]


def test_a_recipe_that_is_refused_leaves_the_one_of_the_run(recipe, alone):
    folder = recipe.parent / "first"
    before = (folder / "config.yaml").read_bytes()
    with pytest.raises(BadData):
        finetune(
            load_recipe(
                recipe, [*validated(recipe, "first"), "finetune.steps=4", "finetune.seed=1"]
            ),
            ALONE,
        )
    assert (folder / "config.yaml").read_bytes() == before
