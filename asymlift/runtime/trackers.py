"""Where the numbers and pictures of a run go beside metrics.jsonl: TensorBoard, Weights & Biases.

What a tracker cannot write costs a warning, never the run.
"""

import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Protocol
from uuid import uuid4

import numpy as np

from asymlift.artifacts.files import write_bytes_atomically
from asymlift.errors import Unavailable
from asymlift.report.pictures import reduced
from asymlift.runtime.log import warn

WIDEST = 1600  # pixels of a picture that a tracker gets; the file itself is larger
FLUSH_SECONDS = 30
LOGIN_SECONDS = 30  # where somebody sits at the terminal; elsewhere nobody is asked


class Tracker(Protocol):
    """Takes what a run measures, in the order of steps."""

    name: str

    def numbers(self, step: int, values: Mapping[str, Any]) -> None: ...

    def picture(self, step: int, name: str, path: Path) -> None: ...

    def close(self) -> None: ...


class Trackers:
    """Several as one. The first is the run's own and tried again; others are left after a fault."""

    def __init__(self, trackers: Sequence[Tracker]) -> None:
        self.trackers, self.warned = list(trackers), set[str]()

    def add(self, name: str, begin: Callable[[], Tracker]) -> None:
        try:
            self.trackers.append(begin())
        except Exception as error:
            self.tell_once(name, error)

    def numbers(self, step: int, values: Mapping[str, Any]) -> None:
        self.tell(lambda tracker: tracker.numbers(step, values))

    def picture(self, step: int, name: str, path: Path) -> None:
        self.tell(lambda tracker: tracker.picture(step, name, path))

    def close(self) -> None:
        self.tell(lambda tracker: tracker.close())

    def tell(self, what: Callable[[Tracker], None]) -> None:
        for tracker in list(self.trackers):
            try:
                what(tracker)
            except Exception as error:  # whatever a foreign library raises, training goes on
                self.tell_once(tracker.name, error)
                if tracker is not self.trackers[0]:
                    self.trackers.remove(tracker)

    def tell_once(self, name: str, error: Exception) -> None:
        if name not in self.warned:
            warn(f"{name}: {type(error).__name__}: {error}; training goes on")
        self.warned.add(name)


def check_trackers(names: Iterable[str]) -> None:
    """Refuse what is not installed, before hours have gone by."""
    for name in names:
        if find_spec(name) is None:
            raise Unavailable(
                f"finetune.trackers: {name} is not installed; pip install 'asymlift[{name}]', "
                "or leave it out of the list"
            )


def open_tracker(
    name: str, folder: Path, begin: int, *, run: str, config: Mapping[str, Any]
) -> Tracker:
    """A tracker of the run in `folder`, which goes on after step `begin`."""
    if name == "tensorboard":
        return TensorBoard(folder / "tensorboard", begin)
    return Wandb(folder, begin, run=run, config=config)


def scalars(values: Mapping[str, Any]) -> Iterator[tuple[str, float]]:
    """Every number by a name of its own: those of a list are NAME/0, NAME/1, ..."""
    for name, value in values.items():
        if isinstance(value, int | float):
            yield name, float(value)
        elif isinstance(value, list):
            yield from scalars({f"{name}/{place}": inner for place, inner in enumerate(value)})


class TensorBoard:
    """Event files; a run that resumes hides the points that it makes again."""

    name = "tensorboard"

    def __init__(self, folder: Path, begin: int) -> None:
        from torch.utils.tensorboard import SummaryWriter

        first = begin + 1 if begin else 0
        self.writer = SummaryWriter(str(folder), purge_step=first, flush_secs=FLUSH_SECONDS)

    def numbers(self, step: int, values: Mapping[str, Any]) -> None:
        for name, value in scalars(values):
            self.writer.add_scalar(name, value, step)

    def picture(self, step: int, name: str, path: Path) -> None:
        self.writer.add_image(name, np.asarray(reduced(path, WIDEST)), step, dataformats="HWC")

    def close(self) -> None:
        self.writer.close()


class Wandb:
    """Weights & Biases, without an account or a network too: then offline, in RUN/wandb."""

    name = "wandb"

    def __init__(self, folder: Path, begin: int, *, run: str, config: Mapping[str, Any]) -> None:
        import wandb

        self.wandb = wandb
        quietly = wandb.Settings(
            console="off",  # nobody else's output is wrapped or kept
            silent=True,
            disable_git=True,
            disable_code=True,
            login_timeout=LOGIN_SECONDS,
            x_disable_meta=True,  # host, user and command line: run.json says what matters
        )
        arguments = {
            "project": os.environ.get("WANDB_PROJECT") or "asymlift",
            "name": run,
            "id": run_id(folder, begin),
            "resume": "allow",
            "dir": str(folder),
            "config": dict(config),
            "settings": quietly,
        }
        try:
            self.run = wandb.init(**arguments)
        except Exception as error:  # no key, no network, no answer
            said = str(error).splitlines()[0]
            warn(f"wandb: {said} Going on offline: `wandb sync` uploads {folder / 'wandb'} later")
            self.run = wandb.init(**arguments, mode="offline")

    def numbers(self, step: int, values: Mapping[str, Any]) -> None:
        self.run.log(dict(scalars(values)), step=step)

    def picture(self, step: int, name: str, path: Path) -> None:
        self.run.log({name: self.wandb.Image(reduced(path, WIDEST))}, step=step)

    def close(self) -> None:
        self.run.finish()


def run_id(folder: Path, begin: int) -> str:
    """Kept in the run folder, so that a resumed run continues its curves."""
    path = folder / "wandb" / "run-id"
    if begin and path.is_file():
        return path.read_text("utf-8").strip()
    path.parent.mkdir(parents=True, exist_ok=True)
    name = uuid4().hex[:12]
    write_bytes_atomically(path, f"{name}\n".encode())
    return name
