"""Lines go to stderr, and progress is plain without a terminal."""

import io
import json
import os

import pytest
from rich.console import Console

from asymlift.runtime import log
from asymlift.runtime.log import progress


@pytest.fixture(autouse=True)
def as_it_was():
    yield
    log.set_verbosity(0)


class Clock:
    def __init__(self, monkeypatch) -> None:
        self.now = 100.0
        monkeypatch.setattr(log.time, "monotonic", lambda: self.now)


# ---- lines -----------------------------------------------------------------------------------


def test_everything_human_goes_to_stderr_as_it_is(capsys):
    log.say("[bold]no markup[/bold] " + "x" * 300)
    log.warn("careful [1]")
    log.detail("hidden")
    out, err = capsys.readouterr()
    assert out == ""
    assert err == "[bold]no markup[/bold] " + "x" * 300 + "\nwarning: careful [1]\n"


def test_verbosity_hides_and_shows(capsys):
    log.set_verbosity(1)
    log.detail("shown")
    log.set_verbosity(-1)
    for speak in (log.say, log.warn, log.detail):
        speak("hidden")
    with progress("work", 2) as ticker:
        ticker.tick(2)
    assert capsys.readouterr().err == "shown\n"


def test_a_warning_is_kept_where_the_screen_is_silent(capsys, tmp_path):
    keep = log.kept_warnings(tmp_path / "logs" / "rank-1.log")
    keep("one")
    log.set_verbosity(-1)
    keep("two")
    log.set_verbosity(0)
    assert capsys.readouterr().err == "warning: one\n"
    lines = (tmp_path / "logs" / "rank-1.log").read_text().splitlines()
    assert [line[20:] for line in lines] == ["one", "two"]


def test_lines_that_a_full_disk_refuses_are_said_once_and_end_nothing(tmp_path, monkeypatch):
    path, told = tmp_path / "logs" / "skipped-0.jsonl", []
    notes = log.Notes(path, told.append)
    notes.add([{"sample": "a"}, {"sample": "b"}])
    with monkeypatch.context() as patch:
        patch.setattr(log, "follow_no_link", lambda *_: os.open("/dev/full", os.O_RDWR))
        for _ in range(2):
            notes.add([{"sample": "c"}])
    assert told == [f"{path}: No space left on device; training goes on without its lines"]
    path.write_bytes(path.read_bytes()[:-3])  # as a disk leaves it that is almost full
    notes.add([{"sample": "d"}])
    lines = path.read_text().splitlines()
    assert [json.loads(line) for line in (lines[0], *lines[2:])] == [
        {"sample": "a"},
        {"sample": "d"},
    ]

    (tmp_path / "link").symlink_to(path)
    log.Notes(tmp_path / "link", told.append).add([{}])
    assert "Too many levels of symbolic links" in told[1] and path.read_text().splitlines() == lines


def test_a_complaint_is_heard_although_the_command_is_quiet(capsys, tmp_path):
    tell = log.kept(log.complain, tmp_path / "run.log")
    tell("one")
    log.set_verbosity(-1)
    tell("two")
    log.set_verbosity(0)
    assert capsys.readouterr().err == "error: one\nerror: two\n"
    assert len((tmp_path / "run.log").read_text().splitlines()) == 2


def test_no_run_ends_because_its_log_cannot_be_written(tmp_path):
    (tmp_path / "logs").write_text("a file where a folder should be")
    log.keep_line(tmp_path / "logs" / "rank-0.log", "lost")


def test_a_document_is_all_that_stdout_gets(capsys, tmp_path):
    log.say("talk")
    log.print_json({"path": tmp_path, "value": 1.5, "loss": float("nan")})
    out, _ = capsys.readouterr()
    assert json.loads(out) == {"path": str(tmp_path), "value": 1.5, "loss": None}
    assert out.endswith("}\n")


# ---- progress --------------------------------------------------------------------------------


def test_of_an_unknown_total_only_what_is_done_is_said(capsys, monkeypatch):
    clock = Clock(monkeypatch)
    with progress("list pictures", 0) as ticker:
        clock.now += 20
        ticker.tick(1000)
    assert capsys.readouterr().err == "list pictures: 1000\n"
    monkeypatch.delenv("CI", raising=False)
    monkeypatch.delenv("NO_COLOR", raising=False)
    monkeypatch.setattr(log, "console", Console(file=io.StringIO(), force_terminal=True))
    with progress("list pictures", 0) as ticker:
        assert ticker.bar is not None and ticker.bar.tasks[0].total is None


def test_without_a_terminal_progress_is_a_line_now_and_then(capsys, monkeypatch):
    clock = Clock(monkeypatch)
    with progress("finetune", 100, done=20) as ticker:
        for _ in range(30):
            clock.now += 1
            ticker.tick(note="loss 0.5")
    lines = capsys.readouterr().err.splitlines()
    # 10 steps in 10 s, 70 to go; steps done before the resume say nothing about the speed
    assert lines == [
        "finetune: 30/100, 70 s to go loss 0.5",
        "finetune: 40/100, 60 s to go loss 0.5",
        "finetune: 50/100, 50 s to go loss 0.5",
    ]


def test_quick_work_says_nothing_and_idle_work_no_time(capsys, monkeypatch):
    clock = Clock(monkeypatch)
    with progress("letters", 3) as ticker:
        ticker.tick(3)
    with progress("waiting", 5) as ticker:
        clock.now += 11
        ticker.tick(0)
    assert capsys.readouterr().err == "waiting: 0/5\n"


@pytest.mark.parametrize("variable, live", [(None, True), ("CI", False), ("NO_COLOR", False)])
def test_a_terminal_gets_a_bar_and_a_log_does_not(monkeypatch, variable, live):
    for name in ("CI", "NO_COLOR"):
        monkeypatch.delenv(name, raising=False)
    if variable:
        monkeypatch.setenv(variable, "1")
    screen = io.StringIO()
    terminal = Console(file=screen, force_terminal=True, width=100, _environ={})
    monkeypatch.setattr(log, "console", terminal)
    with progress("copying", 4, done=1) as ticker:
        assert (ticker.bar is not None) == live
        ticker.tick(2, note="halfway")
        if ticker.bar is not None:
            ticker.bar.refresh()
    assert ("copying" in screen.getvalue() and "3/4" in screen.getvalue()) == live
    if ticker.bar is not None:
        assert ticker.bar.finished is False and not ticker.bar.live.is_started


def test_a_bar_ends_when_the_work_fails(monkeypatch):
    monkeypatch.delenv("CI", raising=False)
    monkeypatch.delenv("NO_COLOR", raising=False)
    monkeypatch.setattr(log, "console", Console(file=io.StringIO(), force_terminal=True))
    with pytest.raises(ValueError), progress("work", 2) as ticker:
        raise ValueError
    assert not ticker.bar.live.is_started
