"""Saves that the disk refuses, and restoring without holding a whole file."""

import errno
import os
import weakref
from pathlib import Path
from typing import Any

import pytest
import torch

from asymlift.artifacts import checkpoint, manifest, safetensors_stream
from asymlift.artifacts.checkpoint import open_checkpoint, steps_on_disk
from asymlift.artifacts.safetensors_stream import SafetensorsWriter
from asymlift.errors import CannotWrite, Exit
from asymlift.recipe import Recipe, load_recipe
from asymlift.runtime import watch
from asymlift.runtime.dist import Ranks
from asymlift.runtime.metrics import read_metrics
from asymlift.stages.finetune.preview import Previews
from asymlift.stages.finetune.run import finetune
from asymlift.stages.finetune.start import Start
from asymlift.stages.finetune.state import TrainingState
from tests.stages.small_run import another_run, build, drive

ALONE = Ranks(0, 1, 0)


@pytest.fixture(scope="module")
def recipe(tmp_path_factory) -> Path:
    return build(tmp_path_factory.mktemp("runs"))


def run_of(recipe: Path, name: str, *overrides: str) -> Recipe:
    """Three steps, each of them saved."""
    every = ["finetune.steps=3", "finetune.checkpoint={every: 1, keep: 5}"]
    return load_recipe(recipe, [another_run(recipe, name), *every, *overrides])


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_a_save_that_fails_is_said_and_training_goes_on(recipe, monkeypatch, capfd):
    """There is no room for the first one."""
    answers = iter([1000])
    free = checkpoint.free_bytes
    monkeypatch.setattr(checkpoint, "free_bytes", lambda path: next(answers, None) or free(path))
    use = run_of(recipe, "goes-on")

    report = finetune(use, ALONE)

    said, checkpoints = capfd.readouterr().err, use.run_folder / "checkpoints"
    assert report.step == 3 and steps_on_disk(checkpoints) == [3, 2]
    assert f"error: {checkpoints / 'step-000001'} could not be saved: a save needs" in said
    assert "are free; training goes on, and the next save is tried in its turn" in said
    log = (use.run_folder / "logs" / "rank-0.log").read_text()
    assert "step-000001 could not be saved" in log and "step-000003 in " in log
    lines = read_metrics(use.run_folder / "metrics.jsonl")
    assert ["seconds_saving" in line for line in lines] == [False, False, True]
    assert 0 < lines[2]["seconds_saving"] < 30


def test_pictures_that_fail_are_said_and_training_goes_on(recipe, monkeypatch, capfd):
    """They are drawn right after a save, which may itself have failed for the same reason."""
    write = Previews.write

    def refuse(previews: Previews, step: int, images: torch.Tensor) -> None:
        if step == 1:
            raise CannotWrite("samples: the disk is full")
        write(previews, step, images)

    monkeypatch.setattr(Previews, "write", refuse)
    use = run_of(recipe, "pictures", "finetune.preview={every: 1, steps: 2}")

    assert finetune(use, ALONE).step == 3

    said = capfd.readouterr().err
    assert (
        "error: samples: the disk is full\ntraining goes on without the pictures of step 1\n"
    ) in said
    grids = {path.parent.name for path in use.run_folder.glob("samples/*/grid.png")}
    assert grids == {"step-000000", "step-000002", "step-000003"}


def test_a_save_says_which_tensor_it_is_at_and_the_file_that_asked_to_stop_goes(
    recipe, monkeypatch
):
    """So that the watchdog judges a tensor, not how long a save takes; a stop at the end counts."""
    seen, write = [], SafetensorsWriter.write

    def noted(writer: SafetensorsWriter, name: str, data: Any) -> None:
        seen.append((watch.last.phase, watch.last.note == name))
        write(writer, name, data)

    monkeypatch.setattr(SafetensorsWriter, "write", noted)
    use = run_of(recipe, "noted", "finetune.steps=1")
    use.run_folder.mkdir(exist_ok=True)
    (use.run_folder / "save_quit").touch()

    report = finetune(use, ALONE)

    assert set(seen) == {("saving", True)}
    assert report.step == 1 and not (use.run_folder / "save_quit").exists()


def test_another_run_branches_off_a_checkpoint_and_leaves_it_as_it_is(recipe):
    use, branch = run_of(recipe, "trunk"), run_of(recipe, "branch")
    whole = finetune(use, ALONE).checkpoint
    older = whole.with_name("step-000002")

    report = finetune(branch, ALONE, Start(resume=str(older)))

    assert report.resumed_from == 2 and names(branch.run_folder / "checkpoints") == [whole.name]
    for name in ("trainable", "ema", "optimizer"):
        made, expected = ((f / f"{name}.safetensors") for f in (report.checkpoint, whole))
        assert made.read_bytes() == expected.read_bytes()
    assert names(whole.parent) == ["step-000001", "step-000002", "step-000003"]


def test_two_failures_in_a_row_end_the_run_and_leave_the_last_good_one(recipe, monkeypatch, capfd):
    """The disk fills up in the middle of the second save, and stays full."""
    pwrite, save = os.pwrite, TrainingState.save

    def full(file: int, data: bytes, offset: int) -> int:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    def fill_up(state: TrainingState, step: int, *args: Any, **rest: Any) -> None:
        monkeypatch.setattr(os, "pwrite", pwrite if step == 1 else full)
        save(state, step, *args, **rest)

    monkeypatch.setattr(TrainingState, "save", fill_up)
    use = run_of(recipe, "full")
    checkpoints = use.run_folder / "checkpoints"

    with pytest.raises(CannotWrite) as caught:
        finetune(use, ALONE)

    assert caught.value.exit == Exit.CANNOT_WRITE
    said = str(caught.value)
    assert "step-000003 could not be saved (No space left on device): a save needs" in said
    assert f"the last good checkpoint is {checkpoints / 'step-000001'}. Free some space" in said
    assert names(checkpoints) == ["step-000001"]
    assert open_checkpoint(checkpoints / "step-000001").step == 1
    monkeypatch.undo()

    alive, most, reads = weakref.WeakSet[torch.Tensor](), [0], [0]
    read = safetensors_stream.read_stretch

    def count(*args: Any) -> torch.Tensor:
        tensor = read(*args)
        if args[0].parent.parent == checkpoints:
            alive.add(tensor)
            most[0], reads[0] = max(most[0], len(alive)), reads[0] + 1
        return tensor

    monkeypatch.setattr(safetensors_stream, "read_stretch", count)
    report = finetune(use, ALONE)  # once there is room
    assert (report.resumed_from, report.step) == (1, 3)
    assert reads[0] == 4 * 37  # weights, two moments, average
    assert most[0] <= 2  # of these in memory at once


def test_a_last_save_that_fails_ends_every_rank(recipe):
    """Where checkpoints should go there is a file. The first failure does not end the run."""
    name = another_run(recipe, "no-folder")
    (recipe.parent / "no-folder" / "checkpoints").write_text("")
    job = [name, "finetune.steps=2", "finetune.checkpoint.every=1"]

    _, codes, said = drive(recipe, [job], ranks=2)

    assert codes == [Exit.CANNOT_WRITE] * 2, said
    assert "step-000001 could not be saved (" in said[0]
    assert "training goes on" in said[0] and "training goes on" not in said[1]
    for text in said:
        assert "step-000002 could not be saved (" in text
        assert "there is none yet. Free some space there, or let it be written to" in text
        assert "Traceback" not in text


def test_a_stop_that_cannot_be_saved_is_not_called_resumable(recipe, monkeypatch):
    monkeypatch.setattr(checkpoint, "free_bytes", lambda path: 1000)
    use = run_of(recipe, "stopped")
    use.run_folder.mkdir(exist_ok=True)
    (use.run_folder / "save_quit").touch()

    with pytest.raises(CannotWrite, match="step-000001 could not be saved"):
        finetune(use, ALONE)


def test_files_are_hashed_while_they_are_written_and_not_again(recipe, monkeypatch):
    hashed: list[str] = []
    again = manifest.sha256_file
    monkeypatch.setattr(manifest, "sha256_file", lambda p: hashed.append(p.name) or again(p))
    use = run_of(recipe, "hashed", "finetune.steps=1")

    report = finetune(use, ALONE)

    assert hashed == ["state.json"]
    monkeypatch.undo()
    assert open_checkpoint(report.checkpoint).step == 1


def test_old_checkpoints_that_cannot_be_removed_are_said(recipe, monkeypatch, capfd):
    def refuse(*args: Any) -> None:
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))

    monkeypatch.setattr("asymlift.stages.finetune.state.prune", refuse)

    assert finetune(run_of(recipe, "kept"), ALONE).step == 3

    assert "old checkpoints cannot be removed ([Errno 13] Permission denied)" in (
        capfd.readouterr().err
    )


def test_it_goes_on_with_other_ranks_another_stage_micro_batch_and_more_steps(recipe):
    """Two ranks at stage 3, then one at stage 1: the same samples, losses to rounding."""
    common = ["finetune.clip=null", "finetune.zero.stage=3"]
    whole, cut = (another_run(recipe, name) for name in ("whole", "fewer-ranks"))
    jobs = [[whole, *common, "finetune.steps=4"], [cut, *common, "finetune.steps=2"]]
    [expected, _], codes, said = drive(recipe, jobs, ranks=2)
    assert codes == [0, 0], said

    job = [cut, "finetune.clip=null", "finetune.zero.stage=1", "finetune.micro_batch=2"]
    [found], codes, said = drive(recipe, [[*job, "finetune.steps=4"]])

    assert codes == [0], said
    assert found["resumed_from"] == 2
    losses = [[line["loss"] for line in result["metrics"]] for result in (found, expected)]
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)
    for changed in ("ZeRO 3 on 2 ranks -> ZeRO 1 on 1 rank", "finetune.micro_batch", "2 -> 4"):
        assert changed in said[0]
