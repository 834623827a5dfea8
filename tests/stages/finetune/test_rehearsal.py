"""Everything once before the first step, of which nothing stays."""

import re
from pathlib import Path
from typing import Any

import pytest
import torch

from asymlift.errors import CannotWrite, Exit, Unavailable
from asymlift.recipe import load_recipe
from asymlift.runtime import watch
from asymlift.runtime.dist import Ranks
from asymlift.stages.finetune import rehearsal
from asymlift.stages.finetune.data import ExactData
from asymlift.stages.finetune.rehearsal import Phase, Took, rehearsed, show_rehearsal
from asymlift.stages.finetune.run import finetune
from asymlift.stages.finetune.start import Start
from tests.stages.small_run import another_run, build, drive

ALONE, CPU = Ranks(0, 1, 0), torch.device("cpu")


@pytest.fixture(scope="module")
def recipe(tmp_path_factory) -> Path:
    return build(tmp_path_factory.mktemp("runs"))


def overrides(recipe: Path, name: str) -> list[str]:
    """With everything that can be rehearsed."""
    shards = recipe.parent / "shards"
    return [
        another_run(recipe, name),
        f"data.train={shards}/000000.tar",
        f"data.validation={shards}/000001.tar",
        "finetune.validation={every: 4, samples: 3, levels: 4}",
        "finetune.preview={every: 4, prompts: [a red disc, a teal cross, a disc], steps: 2}",
        "finetune.clip.norm=1000",  # summed in another order at every stage
        "finetune.steps=4",
    ]


def losses(result: dict[str, Any]) -> list[float]:
    return [line["loss"] for line in result["metrics"]]


def test_a_rehearsed_run_ends_with_the_same_bytes(recipe):
    """On two ranks, the average whole or shared out; also one that was cut and changed stage."""
    cut = [*overrides(recipe, "cut"), "--rehearse"]
    jobs = [
        [*overrides(recipe, "plain"), "finetune.zero.stage=2", "finetune.ema.shard=never"],
        [
            *overrides(recipe, "rehearsed"),
            "finetune.zero.stage=2",
            "finetune.ema.shard=always",
            "--rehearse",
        ],
        [*cut, "finetune.zero.stage=3", "finetune.steps=2"],
        [*cut, "finetune.zero.stage=1", "finetune.ema.shard=always"],
    ]

    [plain, whole, _, resumed], codes, said = drive(recipe, jobs, ranks=2)

    assert codes == [0, 0], said
    assert resumed["resumed_from"] == 2
    assert whole["digests"] == plain["digests"] == resumed["digests"]
    assert whole["metrics"] == plain["metrics"]
    assert losses(resumed) == losses(plain)
    pictures = [
        [(path.relative_to(folder), path.read_bytes()) for path in sorted(folder.rglob("*.png"))]
        for folder in (recipe.parent / name / "samples" for name in ("plain", "rehearsed"))
    ]
    assert pictures[0] and pictures[0] == pictures[1]

    rows = ("the first training step", "a training step", "previews", "validation", "a checkpoint")
    log = (recipe.parent / "rehearsed" / "logs" / "rank-0.log").read_text()
    for text in (said[0], log):
        assert "rehearsed, and thrown away" in text
        assert all(row in text for row in rows)
        assert "s per step of the largest pictures: at most about" in text
    assert "rehearsed" not in said[1]
    folders = {path.name for path in (recipe.parent / "cut" / "checkpoints").iterdir()}
    assert folders == {"step-000003", "step-000004"}

    table = (recipe.parent / "cut" / "logs" / "rank-0.log").read_text()
    assert "resumed from" in table
    assert "ZeRO 3 on 2 ranks -> ZeRO 1 on 2 ranks" in table
    assert "finetune.ema.shard" in table


def test_a_disk_that_cannot_take_a_checkpoint_is_noticed_before_the_first_step(recipe, monkeypatch):
    monkeypatch.setattr("asymlift.artifacts.checkpoint.free_bytes", lambda path: 1000)
    use = load_recipe(recipe, [another_run(recipe, "no-room"), "finetune.zero.stage=0"])

    with pytest.raises(CannotWrite) as caught:
        finetune(use, ALONE, Start(rehearse=True))

    assert caught.value.exit == Exit.CANNOT_WRITE
    assert "could not be saved: a save needs" in str(caught.value)
    assert "free some space, or choose another `runs` folder" in str(caught.value)
    assert not (recipe.parent / "no-room" / "metrics.jsonl").exists()
    assert not list((recipe.parent / "no-room").glob("checkpoints/*"))


def test_memory_that_is_not_there_is_told_by_phase():
    def take() -> None:
        torch.empty(1 << 60)

    with pytest.raises(RuntimeError, match="can't allocate memory"):
        rehearsed(Phase("a batch of previews", take), ALONE, CPU)

    assert watch.last.phase.startswith("rehearsing a batch of previews, before which ")
    assert watch.last.phase.endswith(" were held")


def test_a_step_that_does_not_fit_comes_with_the_three_cheapest_changes(recipe, monkeypatch):
    """The largest pictures ask for more than there is; nothing is trained or left behind."""
    monkeypatch.setattr(ExactData, "largest", lambda data: (1 << 24, 1 << 24))
    use = load_recipe(recipe, [another_run(recipe, "too-large"), "finetune.zero.stage=2"])

    with pytest.raises(Unavailable) as caught:
        finetune(use, ALONE, Start(rehearse=True))

    said = str(caught.value)
    assert "out of memory while rehearsing the first training step, before which" in said
    size = r"[\d.]+ MiB"
    parts = ("frozen weights", "trained weights", "optimizer state", "moving average")
    held = ", ".join(f"{part} {size}" for part in parts)
    assert re.search(rf"Of it {held}; the rest passes\.", said)
    assert said.splitlines()[-1] == (
        "Cheapest changes: --set finetune.micro_batch=2 (costs a little time: the batch stays, in "
        "more and smaller passes); --set finetune.gradient_checkpointing=true (costs a third more "
        "time: activations are computed twice); --set finetune.optimizer.kind=adamw_8bit (costs "
        "coarser moments; needs bitsandbytes). `asymlift plan` weighs them"
    )
    assert not (recipe.parent / "too-large" / "metrics.jsonl").exists()


def test_another_failure_of_a_phase_is_its_own():
    with pytest.raises(ZeroDivisionError):
        rehearsed(Phase("a training step", lambda: 1 // 0), ALONE, CPU)


def test_the_second_step_says_how_long_the_run_will_be(capfd):
    took = [
        Took("the first training step", 9.0, 0, 1 << 30),
        Took(rehearsal.STEP, 2.0, 0, 3 << 29),
        Took("a checkpoint", 0.5, 0, 3 << 29),
    ]

    lines = show_rehearsal(took, 5400)

    assert lines == [
        "rehearsed, and thrown away:",
        "  the first training step  peak 1.0 GiB  9.0 s",
        "  a training step          peak 1.5 GiB  2.0 s",
        "  a checkpoint             peak 1.5 GiB  0.5 s",
        "2.0 s per step of the largest pictures: at most about 3 h 0 min for 5400 steps, beside "
        "previews and saves",
    ]
    assert capfd.readouterr().err.splitlines() == lines
