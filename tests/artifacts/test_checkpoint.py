"""A checkpoint is whole or not there; the newest whole one is the truth."""

import json
import shutil
from pathlib import Path

import pytest

from asymlift.artifacts import checkpoint
from asymlift.artifacts.checkpoint import (
    FORMAT,
    check_space,
    committing,
    newest_whole,
    open_checkpoint,
    prune,
    remove_leftovers,
    step_folder,
    steps_on_disk,
)
from asymlift.artifacts.manifest import write_manifest
from asymlift.errors import BadData, CannotWrite


def save(folder: Path, step: int, content: bytes = b"weights") -> Path:
    with committing(folder, step, {"samples": 8 * step}) as staged:
        (staged / "trainable.safetensors").write_bytes(content)
    return step_folder(folder, step)


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def flip(path: Path, position: int = 0) -> None:
    data = bytearray(path.read_bytes())
    data[position] ^= 1
    path.write_bytes(bytes(data))


def whole(folder: Path) -> tuple[int | None, list[str]]:
    warnings: list[str] = []
    found = newest_whole(folder, warnings.append)
    return (found.step if found else None), warnings


def test_what_is_committed_comes_back(tmp_path):
    checkpoints = tmp_path / "deep" / "checkpoints"
    made = save(checkpoints, 250)
    assert made == checkpoints / "step-000250" and names(checkpoints) == ["step-000250"]
    assert names(made) == ["manifest.json", "state.json", "trainable.safetensors"]
    opened = open_checkpoint(made)
    assert (opened.folder, opened.step) == (made, 250)
    assert opened.state == {"format": FORMAT, "step": 250, "samples": 2000}
    assert json.loads((made / "state.json").read_bytes()) == opened.state


@pytest.mark.parametrize("error", [RuntimeError("disk on fire"), KeyboardInterrupt()])
def test_an_exception_inside_leaves_nothing(tmp_path, error):
    save(tmp_path, 1)
    with pytest.raises(type(error)), committing(tmp_path, 2, {}) as staged:
        (staged / "trainable.safetensors").write_bytes(b"half")
        raise error
    assert names(tmp_path) == ["step-000001"]


def test_an_exception_while_committing_leaves_nothing_and_the_older_one_whole(
    tmp_path, monkeypatch
):
    save(tmp_path, 1)
    for step in ("write_bytes_atomically", "write_manifest", "fsync_folder"):
        with monkeypatch.context() as patch:
            patch.setattr(checkpoint, step, lambda *args, **rest: 1 / 0)
            with pytest.raises(ZeroDivisionError):
                save(tmp_path, 2)
        assert names(tmp_path) == ["step-000001"], step
        assert whole(tmp_path) == (1, [])


def test_nothing_has_its_name_before_every_byte_is_on_disk(tmp_path, monkeypatch):
    """The manifest, then fsync, then the rename, then fsync of the folder above."""
    events: list[str] = []

    def log(name, call):
        def wrapped(*args, **rest):
            events.append(name)
            assert not step_folder(tmp_path, 3).exists() or events.count("fsync") > 1
            return call(*args, **rest)

        return wrapped

    monkeypatch.setattr(checkpoint, "write_manifest", log("manifest", checkpoint.write_manifest))
    monkeypatch.setattr(checkpoint, "fsync_folder", log("fsync", checkpoint.fsync_folder))
    save(tmp_path, 3)
    assert events == ["manifest", "fsync", "fsync"]


def test_a_folder_that_cannot_be_written_is_named(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(CannotWrite, match=r"file.*cannot write here"):
        save(tmp_path / "file", 1)


def test_leftovers_of_a_killed_run_are_removed_and_named(tmp_path):
    save(tmp_path, 1)
    left = [".rehearsing-save", ".removing-step-000001-01234567", ".writing-2-abcd0123"]
    for name in left:
        (tmp_path / name / "sub").mkdir(parents=True)
        (tmp_path / name / "sub" / "half").write_text("half")
    (tmp_path / "mine").mkdir()
    assert sorted(remove_leftovers(tmp_path)) == sorted(left)
    assert names(tmp_path) == ["mine", "step-000001"]
    assert remove_leftovers(tmp_path) == [] == remove_leftovers(tmp_path / "none")


def test_steps_are_counted_newest_first_and_other_names_are_not(tmp_path):
    for step in (9, 100, 1234567):
        save(tmp_path, step)
    for name in ("step-12", "step-000100-copy", ".writing-3-ab", "xstep-000003"):
        (tmp_path / name).mkdir()
    assert steps_on_disk(tmp_path) == [1234567, 100, 9]
    assert steps_on_disk(tmp_path / "none") == []


@pytest.mark.parametrize("part", ["trainable.safetensors", "state.json", "manifest.json"])
def test_a_single_flipped_bit_is_found_and_the_older_one_taken(tmp_path, part):
    save(tmp_path, 1)
    newest = save(tmp_path, 2)
    for position in (0, 3, -1):
        flip(newest / part, position)
        with pytest.raises(BadData, match=r"manifest|changed"):
            open_checkpoint(newest)
        step, warnings = whole(tmp_path)
        assert step == 1 and len(warnings) == 1
        assert warnings[0].startswith(f"checkpoint left out, it is damaged: {newest}: ")
        flip(newest / part, position)
        assert whole(tmp_path) == (2, [])


def test_missing_and_foreign_files_are_damage(tmp_path):
    save(tmp_path, 1)
    newest = save(tmp_path, 2)
    (newest / "extra").touch()
    (newest / "trainable.safetensors").unlink()
    with pytest.raises(BadData) as caught:
        open_checkpoint(newest)
    assert str(caught.value) == (
        f"{newest}: extra: not in the manifest; trainable.safetensors: missing"
    )
    assert whole(tmp_path)[0] == 1
    (newest / "manifest.json").unlink()
    _, (said,) = whole(tmp_path)
    assert "there is no manifest.json, so the folder is not complete" in said


def test_every_damaged_one_is_named_before_the_whole_one(tmp_path):
    for step in range(1, 6):
        save(tmp_path, step)
    for step in (5, 4, 2):
        flip(step_folder(tmp_path, step) / "trainable.safetensors")
    step, warnings = whole(tmp_path)
    assert step == 3
    assert [str(step_folder(tmp_path, n)) in said for n, said in zip((5, 4), warnings, strict=True)]


def test_without_checkpoints_a_run_begins_and_with_damaged_ones_only_it_does_not(tmp_path):
    assert whole(tmp_path / "none") == (None, []) == whole(tmp_path)
    for step in (1, 2):
        flip(save(tmp_path, step) / "trainable.safetensors")
    warnings: list[str] = []
    with pytest.raises(BadData) as caught:
        newest_whole(tmp_path, warnings.append)
    assert len(warnings) == 2
    assert str(caught.value) == (
        f"{tmp_path}: all checkpoints in it are damaged; bring back a copy of one, "
        "or move them away to begin anew"
    )


@pytest.mark.parametrize(
    "kind, form, message",
    [
        ("basis", FORMAT, "a basis, not a checkpoint; move it away"),
        (
            "checkpoint",
            FORMAT + 1,
            f"format {FORMAT + 1}; this asymlift reads {FORMAT}: go on with the version that "
            "wrote it",
        ),
    ],
)
def test_another_kind_or_format_is_refused_and_not_skipped(tmp_path, kind, form, message):
    """Skipping it would train from an older step, and delete it later."""
    save(tmp_path, 1)
    newest = save(tmp_path, 2)
    (newest / "state.json").write_text(json.dumps({"format": form, "step": 2}))
    (newest / "manifest.json").unlink()
    write_manifest(newest, kind=kind, facts={})
    for reading in (lambda: open_checkpoint(newest), lambda: whole(tmp_path)):
        with pytest.raises(BadData) as caught:
            reading()
        assert str(caught.value) == f"{newest}: {message}"


@pytest.mark.parametrize(
    "change, said",
    [
        ({"step": None}, "`step` is not as a checkpoint has it"),
        ({"step": True}, "`step` is not as a checkpoint has it"),
        ({"step": 2, "fingerprints": [1]}, "`fingerprints` is not as a checkpoint has it"),
        ({}, "`step` is missing"),
        *(
            ({"step": 2, "lora": lora}, "`lora` is not as a checkpoint has it")
            for lora in (
                "x",
                {"rank": 10**9},
                {"rank": 0, "alpha": 1.0},
                {"rank": 2.0, "alpha": 1.0},
                {"rank": 2, "alpha": "x"},
                {"rank": 2, "alpha": float("nan")},
                {"rank": 2, "alpha": 10**400},
            )
        ),
    ],
)
def test_a_state_changed_by_hand_is_refused_by_file_and_key(tmp_path, change, said):
    newest = save(tmp_path, 2)
    (newest / "state.json").write_text(json.dumps({"format": FORMAT, **change}))
    (newest / "manifest.json").unlink()
    write_manifest(newest, kind="checkpoint", facts={})
    with pytest.raises(BadData) as caught:
        open_checkpoint(newest)
    assert str(caught.value) == f"{newest / 'state.json'}: {said}"


def test_a_damaged_one_of_the_same_step_gives_way(tmp_path):
    flip(save(tmp_path, 2, b"old") / "trainable.safetensors")
    save(tmp_path, 2, b"new")
    assert names(tmp_path) == ["step-000002"]
    assert whole(tmp_path) == (2, [])
    assert (tmp_path / "step-000002" / "trainable.safetensors").read_bytes() == b"new"


def test_a_damaged_newer_one_does_not_push_out_what_is_saved_next(tmp_path):
    """Resumed from 200 because 300 is damaged: 250 is the newest, and the one to keep."""
    save(tmp_path, 200)
    flip(save(tmp_path, 300) / "trainable.safetensors")
    assert whole(tmp_path)[0] == 200
    save(tmp_path, 250)
    prune(tmp_path, keep=1, milestone=None)
    assert names(tmp_path) == ["step-000250"]


def test_the_newest_and_the_milestones_are_kept(tmp_path):
    for step in range(100, 1100, 100):
        save(tmp_path, step)
    prune(tmp_path, keep=20, milestone=None)
    assert len(steps_on_disk(tmp_path)) == 10
    prune(tmp_path, keep=2, milestone=300)
    assert steps_on_disk(tmp_path) == [1000, 900, 600, 300]


def test_without_milestones_only_the_newest_are_kept(tmp_path):
    for step in range(1, 13):
        save(tmp_path, step)
    prune(tmp_path, keep=1, milestone=None)
    assert names(tmp_path) == ["step-000012"]


def test_a_deletion_that_is_cut_off_leaves_nothing_that_looks_whole(tmp_path, monkeypatch):
    for step in (1, 2):
        save(tmp_path, step)
    with monkeypatch.context() as patch:
        patch.setattr(shutil, "rmtree", lambda *args, **rest: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            prune(tmp_path, keep=1, milestone=None)
    assert steps_on_disk(tmp_path) == [2]
    (left,) = remove_leftovers(tmp_path)
    assert left.startswith(".removing-step-000001-")


def test_a_save_that_cannot_end_does_not_begin(tmp_path, monkeypatch):
    monkeypatch.setattr(checkpoint, "free_bytes", lambda path: 1200)
    check_space(tmp_path, 1000)
    with pytest.raises(CannotWrite) as caught:
        check_space(tmp_path, 1001)
    assert str(caught.value) == (
        f"{tmp_path}: a checkpoint needs 1.2 KiB, 1.2 KiB are free; free some space"
    )
    monkeypatch.undo()
    check_space(tmp_path / "not" / "yet", 1)
