"""Training state, from the engine to a checkpoint and back.

It is keyed by parameter name and whole, so it fits any ZeRO stage and any number of ranks.
"""

import math
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from itertools import chain, islice
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from asymlift.artifacts.checkpoint import (
    EMA,
    OPTIMIZER,
    TRAINABLE,
    Checkpoint,
    check_space,
    committing,
    prune,
    step_folder,
)
from asymlift.artifacts.files import free_bytes, human_bytes
from asymlift.artifacts.safetensors_stream import (
    SafetensorsWriter,
    TensorInfo,
    stretch_reader,
)
from asymlift.errors import CannotWrite, UserError
from asymlift.model.ema import Ema
from asymlift.recipe import CheckpointSection
from asymlift.runtime import dist, watch
from asymlift.runtime.engine import Engine
from asymlift.runtime.log import complain, detail, kept

Shapes = dict[str, tuple[int, ...]]
MOST_FAILURES = 2  # saves in a row that fail before the run ends


class TrainingState:
    """Saves and restores one engine and its average. Every rank has to call every method.

    How long a save takes is bounded by the disk: every byte is written once, hashed as it is
    read back from the page cache while it is synced, and gathered one tensor at a time.
    """

    def __init__(
        self,
        checkpoints: Path,
        engine: Engine,
        ema: Ema | None,
        keep: CheckpointSection,
        log: Path,
    ) -> None:
        self.checkpoints, self.engine, self.ema, self.keep = checkpoints, engine, ema, keep
        self.ranks = engine.ranks
        self.complain, self.detail = kept(complain, log), kept(detail, log)
        self.failures = 0  # in a row
        self.seconds: float | None = None  # that the last save took, until it is told
        self.good: Path | None = None  # the last checkpoint that is known to be whole

    @property
    def parameters(self) -> list[list[Any]]:
        """Name, shape and role. A list, as the order counts and JSON objects get sorted."""
        roles = self.engine.trainable.roles
        return [[name, list(self.engine.shape_of(name)), roles[name]] for name in roles]

    def files(self) -> dict[str, Shapes]:
        """File -> the tensors in it, all float32, in the order in which they are gathered."""
        engine = self.engine
        shapes = {name: engine.shape_of(name) for name in engine.trainable.parameters}
        moments = {key: shapes[name] for name in shapes for key in engine.moment_names(name)}
        files = {TRAINABLE: shapes, OPTIMIZER: moments}
        return files if self.ema is None else {**files, EMA: shapes}

    def gathered(self) -> Iterator[tuple[str, Tensor]]:
        """The tensors of all files, whole, one at a time. Every rank has to iterate."""
        for name, tensor in chain(self.engine.weights(), self.engine.moments(), self.averages()):
            watch.going_on(name)  # a save may take as long as it takes, a tensor may not
            yield name, tensor

    def averages(self) -> Iterator[tuple[str, Tensor]]:
        if self.ema is not None:
            for name, held in self.ema.shown.items():
                yield name, self.engine.whole(name, held)

    def showing_average(self) -> AbstractContextManager[None]:
        """Inside, pictures are made and losses measured with the average, if there is one."""
        ema = self.ema
        return nullcontext() if ema is None else self.engine.showing(ema.shards, ema.owners)

    # --- saving -----------------------------------------------------------------------------------

    def save(self, step: int, facts: dict[str, Any], *, must: bool) -> None:
        """Save; one rename makes it a checkpoint.

        A failure is said, and training goes on without; it ends the run if the save `must` be, or
        if the one before failed too.
        """
        started = time.monotonic()
        error = self.attempt(self.checkpoints, step, facts)
        if error is None:
            self.failures, self.good = 0, step_folder(self.checkpoints, step)
            dist.first_does(self.ranks, self.prune)
            self.seconds = round(time.monotonic() - started, 3)
            if self.ranks.first:
                self.detail(f"saved {self.good} in {self.seconds:.1f} s")
            return
        self.failures += 1
        if must or self.failures == MOST_FAILURES:
            again = "" if must else "; it was the second save in a row that failed"
            left = f"the last good checkpoint is {self.good}" if self.good else "there is none yet"
            raise CannotWrite(
                f"{error}{again};\n{left}. Free some space there, or let it be written to, and run "
                "the same command again"
            )
        if self.ranks.first:
            self.complain(f"{error}; training goes on, and the next save is tried in its turn")

    def told(self) -> dict[str, float]:
        """What the line of the step after a save says of it."""
        told = {} if self.seconds is None else {"seconds_saving": self.seconds}
        self.seconds = None
        return told

    def attempt(self, checkpoints: Path, step: int, facts: dict[str, Any]) -> str | None:
        """Gather one tensor at a time; rank 0 writes; one rename makes it a checkpoint.

        Returns what was wrong, the same on every rank.
        """
        files = self.files()
        needed = sum(4 * math.prod(shape) for part in files.values() for shape in part.values())
        facts = {**facts, "updates": self.engine.num_updates}
        said = dist.first_does(
            self.ranks,
            lambda: failure(
                lambda: check_space(checkpoints, needed), step_folder(checkpoints, step), needed
            ),
        )
        if said is not None:
            return said
        gathered = self.gathered()
        if self.ranks.first:
            said = failure(
                lambda: write(checkpoints, step, facts, files, gathered),
                step_folder(checkpoints, step),
                needed,
            )
        for _, tensor in gathered:  # every rank takes part, also when nothing can be written
            wait_for(tensor)
        return dist.first_does(self.ranks, lambda: said)

    def prune(self) -> None:
        try:
            prune(self.checkpoints, self.keep.keep, self.keep.milestone)
        except OSError as error:
            self.complain(f"{self.checkpoints}: old checkpoints cannot be removed ({error})")

    # --- restoring --------------------------------------------------------------------------------

    def restore(self, checkpoint: Checkpoint) -> None:
        """Weights, average and what the optimizer remembers. A rank reads what it holds of each."""
        self.good = checkpoint.folder
        dist.all_do(self.ranks, lambda: self.read(checkpoint))

    def read(self, checkpoint: Checkpoint) -> None:
        folder = checkpoint.folder
        self.engine.set_weights(stretch_reader(folder / TRAINABLE))
        self.engine.set_moments(stretch_reader(folder / OPTIMIZER), checkpoint.state["updates"])
        if self.ema is not None:
            read = stretch_reader(folder / (EMA if (folder / EMA).exists() else TRAINABLE))
            for name, held in self.ema.shards.items():
                self.engine.fill_shard(name, held, read)


def wait_for(tensor: Tensor) -> None:
    """On a GPU collectives only queue up, and the timeout of each runs from that moment on."""
    if tensor.is_cuda:
        torch.cuda.current_stream(tensor.device).synchronize()


def write(
    checkpoints: Path,
    step: int,
    facts: dict[str, Any],
    files: dict[str, Shapes],
    gathered: Iterator[tuple[str, Tensor]],
) -> None:
    """Rank 0's part of a save: the files, one after another, and the commit."""
    hashes: dict[str, str] = {}
    with committing(checkpoints, step, facts, hashes) as staged:
        for name, shapes in files.items():
            infos = {key: TensorInfo("F32", shape) for key, shape in shapes.items()}
            with SafetensorsWriter(staged / name, infos) as writer:
                for key, tensor in islice(gathered, len(shapes)):
                    writer.write(key, tensor.detach().float().cpu().contiguous())
            hashes[name] = writer.sha256


def failure(action: Callable[[], None], target: Path, needed: int) -> str | None:
    """What the disk refused, with what would be needed; None if it did not."""
    try:
        action()
    except (UserError, OSError) as error:
        cause = error.__cause__ or error
        why = cause.strerror if isinstance(cause, OSError) else None
        return (
            f"{target} could not be saved{f' ({why})' if why else ''}: a save needs "
            f"{human_bytes(needed * 1.2)}, {human_bytes(free_bytes(target))} are free"
        )
    return None
