"""metrics.jsonl survives kills, resumes and a full disk."""

import math

import pytest

from asymlift.errors import CannotWrite
from asymlift.runtime.metrics import Metrics, read_metrics


def steps(path):
    return [line["step"] for line in read_metrics(path)]


def test_a_resumed_run_drops_the_lines_after_its_step(tmp_path):
    path = tmp_path / "run" / "metrics.jsonl"
    first = Metrics(path, 0)
    for step in range(8):
        first.numbers(step, {"loss": float(step), "name": "old"})
    first.close()
    second = Metrics(path, 5)
    assert steps(path) == [0, 1, 2, 3, 4, 5]
    second.numbers(6, {"loss": 60.0})
    assert read_metrics(path)[5:] == [
        {"step": 5, "loss": 5.0, "name": "old"},
        {"step": 6, "loss": 60.0},
    ]  # while the file is still open
    second.close()
    assert sorted(p.name for p in path.parent.iterdir()) == ["metrics.jsonl"]


def test_what_comes_late_of_the_step_that_a_run_goes_on_from_stands_in_its_line(tmp_path):
    path = tmp_path / "metrics.jsonl"
    first = Metrics(path, 0)
    for step in (0, 1, 2):
        first.numbers(step, {"loss": float(step)})
    first.close()
    second = Metrics(path, 1)
    second.numbers(1, {"validation_loss": 5.0})
    second.numbers(2, {"loss": 20.0})
    second.close()
    assert read_metrics(path) == [
        {"step": 0, "loss": 0.0},
        {"step": 1, "loss": 1.0, "validation_loss": 5.0},
        {"step": 2, "loss": 20.0},
    ]


def test_a_number_that_is_not_finite_is_null(tmp_path):
    """JSON has no NaN, and many readers refuse the file."""
    metrics = Metrics(tmp_path / "metrics.jsonl", 0)
    metrics.numbers(1, {"loss": math.nan, "loss_by_sigma": [math.inf, 1.0]})
    metrics.close()
    text = (tmp_path / "metrics.jsonl").read_text()
    assert text == '{"step": 1, "loss": null, "loss_by_sigma": [null, 1.0]}\n'


def test_a_run_from_the_start_measures_step_0_anew(tmp_path):
    path = tmp_path / "metrics.jsonl"
    first = Metrics(path, 0)
    first.numbers(0, {"validation_loss": 1.0})
    first.numbers(1, {})
    first.close()
    Metrics(path, 0).close()
    assert read_metrics(path) == []


@pytest.mark.parametrize("tail", ['{"step": 3, "lo', "\0\0\0\0", '{"step": 3', "\udcff"])
def test_a_last_line_cut_by_a_kill_is_left_out(tmp_path, tail):
    path = tmp_path / "metrics.jsonl"
    whole = b'{"step": 1, "loss": 2.0}\n{"step": 2, "loss": NaN}\n'
    path.write_bytes(whole + tail.encode("utf-8", errors="surrogateescape"))
    assert steps(path) == [1, 2]
    metrics = Metrics(path, 9)
    metrics.numbers(3, {"loss": 1.0})
    metrics.close()
    assert steps(path) == [1, 2, 3]
    assert path.read_bytes().startswith(whole.replace(b"NaN", b"null"))


class FullDisk:
    """Takes so many bytes, then half of every write, as a disk does that is almost full."""

    def __init__(self, file):
        self.file, self.full = file, True

    def write(self, data):
        return self.file.write(data[: len(data) // 2] if self.full else data)

    def close(self):
        self.file.close()


def test_a_line_that_a_full_disk_cuts_costs_that_line_alone(tmp_path):
    path = tmp_path / "metrics.jsonl"
    metrics = Metrics(path, 0)
    metrics.numbers(1, {"loss": 1.0})
    metrics.file = disk = FullDisk(metrics.file)
    for step in (2, 3):
        with pytest.raises(OSError, match=r"of \d+ bytes were written: is the disk full\?"):
            metrics.numbers(step, {"loss": 2.0})
    disk.full = False
    metrics.numbers(4, {"loss": 4.0})
    metrics.numbers(5, {"loss": 5.0})
    metrics.close()
    assert steps(path) == [1, 4, 5]


def test_a_place_that_cannot_be_written_is_refused_by_name(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(CannotWrite, match="file"):
        Metrics(tmp_path / "file" / "metrics.jsonl", 0)
