"""Requests to stop that let the current step end: signals, Ctrl-C, and a file."""

import signal
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import FrameType

from asymlift.errors import Exit, StoppedEarly

SAVE_QUIT = "save_quit"  # an empty file of this name in the run folder


@dataclass
class StopRequest:
    """Set by a signal; looked at once per step."""

    reason: str | None = None
    exit: Exit = Exit.RESUMABLE

    def look_for_file(self, folder: Path) -> None:
        if self.reason is None and (folder / SAVE_QUIT).exists():
            self.reason = f"a {SAVE_QUIT} file"

    def obeyed(self, folder: Path) -> None:
        """Take the file away, or the next run would stop at once."""
        (folder / SAVE_QUIT).unlink(missing_ok=True)


@contextmanager
def raising_on_signals() -> Iterator[None]:
    """Turn SIGTERM and SIGUSR1 into an error, for work that loses nothing when it is cut off."""

    def stop(number: int, frame: FrameType | None) -> None:
        name = signal.Signals(number).name
        raise StoppedEarly(f"stopped by {name}; what is finished is kept: run it again to go on")

    before = {number: signal.signal(number, stop) for number in (signal.SIGTERM, signal.SIGUSR1)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


@contextmanager
def stop_requests() -> Iterator[StopRequest]:
    """Turn SIGTERM, SIGUSR1 and the first Ctrl-C into a request; the second Ctrl-C interrupts."""
    request = StopRequest()

    def ask(number: int, frame: FrameType | None) -> None:
        if number == signal.SIGINT:
            if request.reason is not None:
                raise KeyboardInterrupt
            request.exit = Exit.INTERRUPTED
        request.reason = "Ctrl-C" if number == signal.SIGINT else signal.Signals(number).name

    before = {
        number: signal.signal(number, ask)
        for number in (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)
    }
    try:
        yield request
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
