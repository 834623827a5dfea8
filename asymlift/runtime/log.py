"""What people see while a stage runs: lines and progress.

Everything human goes to stderr; stdout is for the one JSON document of `--json`. A terminal gets
a live progress bar, anything else plain lines now and then.
"""

import errno
import os
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from rich.console import Console, RenderableType
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from asymlift.artifacts.files import follow_no_link
from asymlift.artifacts.parsing import json_text
from asymlift.redact import redacted, redacted_values
from asymlift.words import human_seconds

PLAIN_INTERVAL = 10.0  # seconds between lines when there is no terminal

console = Console(stderr=True, highlight=False, soft_wrap=True)
verbosity = 0  # -q is -1, -v is 1; set once by the command line, silenced on ranks above 0


def set_verbosity(level: int) -> None:
    global verbosity
    verbosity = level
    console.quiet = level < 0


def say(text: str, *, style: str | None = None) -> None:
    console.print(redacted(text), style=style, markup=False)


def detail(text: str) -> None:
    """A line for -v only."""
    if verbosity > 0:
        console.print(redacted(text), style="dim", markup=False)


def warn(text: str) -> None:
    console.print(f"warning: {redacted(text)}", style="yellow", markup=False)


def complain(text: str) -> None:
    """Something failed, and the command goes on. Also said with -q."""
    if console.quiet:
        sys.stderr.write(f"error: {redacted(text)}\n")
    else:
        console.print(f"error: {redacted(text)}", style="red", markup=False)


def keep_line(path: Path, text: str) -> None:
    """Add a line to a log file, if that can be: no run ends because its log cannot be written."""
    with suppress(OSError):
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(path, "a", encoding="utf-8", opener=follow_no_link) as file:
            file.write(f"{time.strftime('%Y-%m-%d %H:%M:%S')} {redacted(text)}\n")


class Notes:
    """Lines of JSON that a run writes down. Where the disk refuses them, that is said once."""

    def __init__(self, path: Path, tell: Callable[[str], None]) -> None:
        self.path, self.tell, self.told = path, tell, False

    def add(self, lines: Iterable[Mapping[str, Any]]) -> None:
        data = "".join(json_text(line) + "\n" for line in lines).encode()
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            with open(self.path, "a+b", buffering=0, opener=follow_no_link) as file:
                if file.seek(0, os.SEEK_END):  # a full disk may have cut the last line
                    file.seek(-1, os.SEEK_END)
                    data = data if file.read(1) == b"\n" else b"\n" + data
                if file.write(data) != len(data):
                    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        except OSError as error:
            if not self.told:
                self.tell(f"{self.path}: {error.strerror}; training goes on without its lines")
            self.told = True


def kept(tell: Callable[[str], None], path: Path) -> Callable[[str], None]:
    """Also write to a file what is told: the screens of ranks above 0 are silent."""

    def keep(text: str) -> None:
        tell(text)
        keep_line(path, text)

    return keep


def kept_warnings(path: Path) -> Callable[[str], None]:
    return kept(warn, path)


def is_live() -> bool:
    return console.is_terminal and not (os.environ.get("CI") or os.environ.get("NO_COLOR"))


class Ticker:
    """Progress of one activity, of an unknown total if that is 0; tick as often as you like."""

    def __init__(self, description: str, total: int, done: int = 0) -> None:
        self.description, self.total, self.done, self.begun_at = description, total, done, done
        self.started = self.last_line = time.monotonic()
        self.bar: Progress | None = None
        if is_live() and not console.quiet:
            self.bar = Progress(
                TextColumn("{task.description}"),
                BarColumn(),
                MofNCompleteColumn(),
                TimeRemainingColumn(),
                TextColumn("{task.fields[note]}"),
                console=console,
                transient=True,
            )
            self.task = self.bar.add_task(description, total=total or None, completed=done, note="")
            self.bar.start()

    def tick(self, count: int = 1, note: str = "") -> None:
        self.done += count
        if self.bar is not None:
            self.bar.update(self.task, completed=self.done, note=note)
            return
        now = time.monotonic()
        if now - self.last_line >= PLAIN_INTERVAL:
            self.last_line = now
            done = f"{self.done}/{self.total}" if self.total else str(self.done)
            say(f"{self.description}: {done}{self.eta(now)} {note}".rstrip())

    def eta(self, now: float) -> str:
        made = self.done - self.begun_at
        if made <= 0 or not self.total:
            return ""
        left = (now - self.started) / made * (self.total - self.done)
        return f", {human_seconds(left)} to go"

    def close(self) -> None:
        if self.bar is not None:
            self.bar.stop()


@contextmanager
def progress(description: str, total: int, done: int = 0) -> Iterator[Ticker]:
    ticker = Ticker(description, total, done)
    try:
        yield ticker
    finally:
        ticker.close()


def answer(text: str) -> None:
    """A line on stdout: what a command was asked for."""
    sys.stdout.write(f"{redacted(text)}\n")


def answer_drawn(drawn: RenderableType, width: int) -> None:
    """A rich table on stdout: as wide as the terminal, or so wide where there is none."""
    out = Console()
    Console(width=None if out.is_terminal else width).print(drawn)


def print_json(document: Any) -> None:
    sys.stdout.write(json_text(redacted_values(document), indent=2) + "\n")
