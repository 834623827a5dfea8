"""What rank 0 tells of a step, and that nothing of it ends the run."""

import pytest
import torch

from asymlift.runtime.metrics import read_metrics
from asymlift.stages.finetune import journal as finetune_journal
from asymlift.stages.finetune.journal import Journal
from tests.stages.small_run import small_recipe

STEP = {
    "loss": 1.0,
    "seconds": 0.5,
    "seconds_waiting_for_data": 0.1,
    "samples": 8,
    "epoch": 0.5,
    "bad_samples": 0,
}


@pytest.fixture
def clock(monkeypatch):
    """A clock that is moved by hand."""

    class Clock:
        now = 1000.0

    monkeypatch.setattr(finetune_journal.time, "monotonic", lambda: Clock.now)
    return Clock


def journal(tmp_path, begin=0):
    return Journal(small_recipe(tmp_path), begin, torch.device("cpu"), lambda: {"no image": 2})


def test_a_line_has_speed_what_is_left_and_the_peak(tmp_path, clock):
    told = journal(tmp_path, begin=2)
    clock.now += 30  # two steps of the eight, with what came between them
    told.step(3, STEP)
    line = told.step(4, STEP)
    told.close()
    assert line.pop("peak_gib") > 0.01
    assert line == STEP | {
        "seconds_computing": 0.4,
        "images_per_second": 16.0,
        "seconds_to_go": 60.0,
    }
    assert [line["step"] for line in read_metrics(tmp_path / "run" / "metrics.jsonl")] == [3, 4]


def test_what_happens_before_the_first_step_says_nothing_about_the_speed(tmp_path, clock):
    told = journal(tmp_path)
    clock.now += 1000
    told.start({"validation_loss": 2.0})
    clock.now += 5
    assert told.step(1, STEP)["seconds_to_go"] == 35.0
    told.close()
    first = read_metrics(tmp_path / "run" / "metrics.jsonl")[0]
    assert first == {"step": 0, "validation_loss": 2.0}


def test_a_start_without_validation_has_no_line(tmp_path):
    told = journal(tmp_path)
    told.start({})
    told.close()
    assert read_metrics(tmp_path / "run" / "metrics.jsonl") == []


def test_a_page_that_cannot_be_written_is_said_once(tmp_path, capsys):
    told = journal(tmp_path)
    told.step(1, STEP)
    told.write_page("running")
    page = tmp_path / "run" / "report.html"
    assert "running, as of" in page.read_text() and "no image" in page.read_text()
    page.unlink()
    page.mkdir()
    told.write_page("running")
    told.write_page("running")
    told.close()
    assert capsys.readouterr().err.count(f"{page}: ") == 1
