"""Where this rank is: the step, what it is doing, since when. For messages and for the watchdog."""

import os
import sys
import threading
import time
from pathlib import Path
from typing import NamedTuple

PACKAGE = os.fspath(Path(__file__).parents[1]) + os.sep


class Place(NamedTuple):
    """What a rank was last said to do."""

    step: int | None  # counted from 1, as in metrics.jsonl
    phase: str  # goes on after "while"
    note: str  # such as the last sample
    patience: float  # how many times the usual timeout it may take
    since: float  # by this machine's time.monotonic
    ends: bool = False  # on its way out, with something left to write

    def __str__(self) -> str:
        step = f"at step {self.step} " if self.step is not None else ""
        note = f" ({self.note})" if self.note else ""
        return f"{step}while {self.phase}{note}"


FIRST_TIME = 4.0  # compiled code, connections, caches: whatever comes first takes longer

last = Place(None, "starting", "", FIRST_TIME, time.monotonic())
known: set[str] = set()  # phases that there were before


def begin() -> None:
    """A run starts: everything is for the first time."""
    known.clear()
    at(None, "starting")


def at(step: int | None, phase: str, note: str = "") -> None:
    """Say what comes now. Costs half a microsecond: nobody else hears of it yet."""
    global last
    patience = 1.0 if phase in known else FIRST_TIME
    known.add(phase)
    last = Place(step, phase, note, patience, time.monotonic())


def going_on(note: str) -> None:
    """Say that the same moves on, such as from one picture to the next."""
    global last
    last = last._replace(note=note, since=time.monotonic())


def ends() -> None:
    """Say that the run ends, as all ranks agreed, and that trackers and files are being closed."""
    global last
    last = last._replace(ends=True)


def forgive(seconds: float) -> None:
    """The whole process stood still for so long, and nothing it did can be blamed for that."""
    global last
    last = last._replace(since=last.since + seconds)


def line_of_code() -> str:
    """The line of this package that the main thread is in, or below; "" if that is who asks."""
    if threading.current_thread() is threading.main_thread():
        return ""
    frame = sys._current_frames().get(threading.main_thread().ident or 0)
    while frame is not None:
        name = frame.f_code.co_filename
        if name.startswith(PACKAGE):
            return f"{name.removeprefix(PACKAGE)}:{frame.f_lineno}"
        frame = frame.f_back
    return ""
