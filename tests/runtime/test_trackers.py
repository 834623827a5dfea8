"""Trackers hold what the run measured, resume without double points, and never end the run."""

import json
import sys

import pytest
import torch

from asymlift.errors import Exit, Unavailable
from asymlift.report.pictures import grid_png
from asymlift.runtime import trackers
from asymlift.runtime.metrics import Metrics, read_metrics
from asymlift.runtime.trackers import Trackers, check_trackers, open_tracker, run_id, scalars


@pytest.fixture
def grid(tmp_path):
    path = tmp_path / "grid.png"
    path.write_bytes(grid_png([("", torch.zeros(2, 3, 8, 8))]))
    return path


def test_numbers_of_lists_get_names_of_their_own():
    values = {"loss": 1, "by": [2.0, None, [3.0]], "name": "x", "none": None}
    assert dict(scalars(values)) == {"loss": 1.0, "by/0": 2.0, "by/2/0": 3.0}


def test_what_is_not_installed_is_refused_with_the_command(monkeypatch):
    monkeypatch.setattr(trackers, "find_spec", lambda name: None)
    with pytest.raises(Unavailable) as caught:
        check_trackers(["wandb"])
    assert caught.value.exit == Exit.UNAVAILABLE
    assert str(caught.value) == (
        "finetune.trackers: wandb is not installed; pip install 'asymlift[wandb]', or leave it "
        "out of the list"
    )
    check_trackers([])


class Broken:
    name = "broken"

    def __init__(self):
        self.calls = 0

    def numbers(self, step, values):
        self.calls += 1
        raise ConnectionError("no network")

    picture = close = numbers


def no_server():
    raise OSError("no server")


def test_a_tracker_that_fails_is_warned_of_once_and_the_others_go_on(tmp_path, capsys, grid):
    metrics, broken = Metrics(tmp_path / "metrics.jsonl", 0), Broken()
    all_of_them = Trackers([metrics, broken])
    all_of_them.add("missing", no_server)
    for step in (1, 2, 3):
        all_of_them.numbers(step, {"loss": 1.0})
        all_of_them.picture(step, "preview", grid)
    all_of_them.close()
    assert broken.calls == 1
    assert len(read_metrics(tmp_path / "metrics.jsonl")) == 3
    assert capsys.readouterr().err.splitlines() == [
        "warning: missing: OSError: no server; training goes on",
        "warning: broken: ConnectionError: no network; training goes on",
    ]


def test_the_runs_own_file_is_tried_again_after_a_fault(tmp_path, capsys):
    metrics = Metrics(tmp_path / "metrics.jsonl", 0)
    all_of_them = Trackers([metrics])
    file, metrics.file = metrics.file, open("/dev/full", "ab", buffering=0)  # noqa: PTH123, SIM115
    all_of_them.numbers(1, {})
    all_of_them.numbers(2, {})
    metrics.file.close()
    metrics.file = file
    all_of_them.numbers(3, {})
    all_of_them.close()
    assert [line["step"] for line in read_metrics(tmp_path / "metrics.jsonl")] == [3]
    assert capsys.readouterr().err.count("warning: metrics.jsonl: OSError") == 1


# ---- TensorBoard -------------------------------------------------------------------------------


def events(folder):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    found = EventAccumulator(str(folder))
    found.Reload()
    return found


def test_tensorboard_has_every_point_once_after_a_resume(tmp_path, grid, capfd):
    pytest.importorskip("tensorboard")
    first = open_tracker("tensorboard", tmp_path, 0, run="x", config={})
    first.numbers(0, {"validation_loss": 2.0})
    for step in (1, 2, 3, 4):
        first.numbers(step, {"loss": float(step), "by": [1.0, None]})
    first.picture(4, "preview", grid)
    first.close()
    second = open_tracker("tensorboard", tmp_path, 2, run="x", config={})
    for step in (3, 4, 5):
        second.numbers(step, {"loss": 10.0 * step})
    second.picture(4, "preview", grid)
    second.close()

    found = events(tmp_path / "tensorboard")
    points = [(point.step, point.value) for point in found.Scalars("loss")]
    assert points == [(1, 1.0), (2, 2.0), (3, 30.0), (4, 40.0), (5, 50.0)]
    assert [point.step for point in found.Scalars("by/0")] == [1, 2]
    assert found.Scalars("validation_loss")[0].value == 2.0
    assert [picture.step for picture in found.Images("preview")] == [4]
    assert capfd.readouterr().out == ""


def test_a_tensorboard_that_starts_again_shows_nothing_of_before(tmp_path):
    pytest.importorskip("tensorboard")
    for value in (1.0, 2.0):
        tracker = open_tracker("tensorboard", tmp_path, 0, run="x", config={})
        tracker.numbers(0, {"loss": value})
        tracker.numbers(1, {"loss": value})
        tracker.close()
    found = events(tmp_path / "tensorboard").Scalars("loss")
    assert [(point.step, point.value) for point in found] == [(0, 2.0), (1, 2.0)]


def test_a_picture_that_tensorboard_cannot_take_does_not_stop_the_run(tmp_path, capsys):
    pytest.importorskip("tensorboard")
    tracker = open_tracker("tensorboard", tmp_path, 0, run="x", config={})
    (tmp_path / "picture.png").write_text("no picture")
    all_of_them = Trackers([Metrics(tmp_path / "metrics.jsonl", 0), tracker])
    all_of_them.picture(1, "preview", tmp_path / "picture.png")
    all_of_them.numbers(1, {"loss": 1.0})
    all_of_them.close()
    tracker.close()
    assert "warning: tensorboard: UnidentifiedImageError" in capsys.readouterr().err


# ---- Weights & Biases --------------------------------------------------------------------------


def test_the_id_of_a_run_is_kept_and_a_new_run_has_a_new_one(tmp_path):
    first = run_id(tmp_path, 0)
    assert run_id(tmp_path, 5) == first
    assert run_id(tmp_path, 0) != first
    assert (tmp_path / "wandb" / "run-id").read_text() == f"{run_id(tmp_path, 9)}\n"


def test_wandb_works_offline_without_an_account(tmp_path, monkeypatch, grid, capfd):
    pytest.importorskip("wandb", reason="wandb is not installed: pip install 'asymlift[wandb]'")
    for name in ("WANDB_API_KEY", "WANDB_MODE", "WANDB_PROJECT"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("WANDB_BASE_URL", "http://127.0.0.1:9")  # whoever has a key: nobody answers
    monkeypatch.setenv("NETRC", str(tmp_path / "none"))
    monkeypatch.setenv("WANDB_CONFIG_DIR", str(tmp_path / "settings"))
    monkeypatch.setattr(sys, "argv", ["asymlift", "finetune", "--set", "a=hidden-word"])
    for begin in (0, 2):
        monkeypatch.setenv("WANDB_MODE", "offline" if begin else "online")
        run = open_tracker("wandb", tmp_path, begin, run="small", config={"finetune": {"lr": 1}})
        run.numbers(begin + 1, {"loss": 1.0, "by": [1.0, None]})
        run.picture(begin + 1, "preview", grid)
        run.close()

    out, err = capfd.readouterr()
    assert out == ""
    assert "Going on offline: `wandb sync` uploads" in err
    name = (tmp_path / "wandb" / "run-id").read_text().strip()
    folders = sorted((tmp_path / "wandb").glob("offline-run-*"))
    assert len(folders) == 2 and all(folder.name.endswith(name) for folder in folders)
    assert len(list(tmp_path.glob("wandb/offline-run-*/files/media/images/*.png"))) == 2
    written = b"".join(path.read_bytes() for path in tmp_path.rglob("*") if path.is_file())
    assert b"hidden-word" not in written
    assert json.dumps(name)[1:-1].encode() in written
