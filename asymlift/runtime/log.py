"""What people see while a stage runs: lines, progress, and metrics.jsonl.

Everything human goes to stderr; stdout is for the one JSON document of `--json`. A terminal gets
a live progress bar, anything else plain lines now and then.
"""

import json
import os
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from asymlift.artifacts.files import write_bytes_atomically, writing
from asymlift.redact import redacted, redacted_values

Item = TypeVar("Item")

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


def kept_warnings(path: Path) -> Callable[[str], None]:
    """`warn` that also writes to a file: the screens of ranks above 0 are silent."""

    def keep(text: str) -> None:
        warn(text)
        with writing(path):
            path.parent.mkdir(parents=True, exist_ok=True)
            with path.open("a", encoding="utf-8") as file:
                file.write(f"{time.strftime('%Y-%m-%d %H:%M:%S')} {redacted(text)}\n")

    return keep


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
        return f", {(now - self.started) / made * (self.total - self.done):.0f} s to go"

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


def track(items: Iterable[Item], description: str, total: int) -> Iterator[Item]:
    with progress(description, total) as ticker:
        for item in items:
            yield item
            ticker.tick()


class Metrics:
    """metrics.jsonl: one line per step; lines after the resumed step are dropped first."""

    def __init__(self, path: Path, resumed_step: int) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        if path.exists():
            kept = [line for line in read_metrics(path) if line["step"] <= resumed_step]
            text = "".join(json.dumps(line) + "\n" for line in kept)
            write_bytes_atomically(path, text.encode())
        self.file = path.open("a", encoding="utf-8")

    def write(self, step: int, **values: Any) -> None:
        self.file.write(json.dumps({"step": step, **values}) + "\n")
        self.file.flush()

    def close(self) -> None:
        self.file.close()


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """All whole lines; a line cut by a kill is left out."""
    lines = []
    for text in path.read_text(encoding="utf-8", errors="replace").splitlines():
        try:
            line = json.loads(text)
        except ValueError:
            break
        if not (isinstance(line, dict) and isinstance(line.get("step"), int)):
            break
        lines.append(line)
    return lines


def answer(text: str) -> None:
    """A line on stdout: what a command was asked for."""
    sys.stdout.write(f"{redacted(text)}\n")


def print_json(document: Any) -> None:
    json.dump(redacted_values(document), sys.stdout, indent=2, default=str)
    sys.stdout.write("\n")
