"""Updates that are not finite: too many in a row end a run, a full disk does not."""

import json

import pytest

from asymlift.errors import BadData
from asymlift.runtime.dist import Ranks
from asymlift.stages.finetune.guard import Guard

NAN = float("nan")


def test_updates_are_left_out_up_to_so_many_in_a_row(tmp_path):
    file, told = tmp_path / "logs" / "not-finite.jsonl", []
    guard = Guard(file, Ranks(0, 1, 0), 2, told.append)
    assert not guard.passes(0, NAN, NAN, False, ["a"])
    assert guard.passes(1, 1.0, 1.0, True, ["b"])
    assert not guard.passes(2, 1.0, NAN, False, ["c"])
    with pytest.raises(BadData, match="2 updates in a row were not finite"):
        guard.passes(3, 1.0, NAN, False, ["d"])
    assert told == [
        "step 1: loss nan, gradient norm nan; samples a; the update was left out",
        "step 3: loss 1.0, gradient norm nan; samples c; the update was left out",
    ]
    assert [json.loads(line)["step"] for line in file.read_text().splitlines()] == [1, 3, 4]


def test_a_record_that_cannot_be_written_is_said_once_and_does_not_end_the_run(tmp_path):
    (tmp_path / "logs").touch()  # a file where a folder should be
    told: list[str] = []
    guard = Guard(tmp_path / "logs" / "not-finite.jsonl", Ranks(0, 1, 0), 3, told.append)
    for step in range(2):
        assert not guard.passes(step, NAN, NAN, False, ["a"])
    assert sum("not-finite.jsonl: File exists; training goes on" in text for text in told) == 1
