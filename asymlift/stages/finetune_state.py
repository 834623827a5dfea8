"""Training state, from the engine to a checkpoint and back.

It is keyed by parameter name and whole, so it fits any ZeRO stage and any number of ranks.
"""

import json
import math
from collections.abc import Callable, Iterator
from itertools import islice, zip_longest
from pathlib import Path
from typing import Any

from torch import Tensor

from asymlift.artifacts.checkpoint import (
    EMA,
    OPTIMIZER,
    TRAINABLE,
    Checkpoint,
    check_space,
    committing,
    newest_whole,
    prune,
    remove_leftovers,
)
from asymlift.artifacts.safetensors_stream import SafetensorsWriter, TensorInfo, load_tensors
from asymlift.errors import BadData, UserError
from asymlift.model.ema import Ema
from asymlift.recipe import CheckpointSection
from asymlift.runtime import dist
from asymlift.runtime.dist import Ranks
from asymlift.runtime.engine import MOMENTS, Engine
from asymlift.runtime.log import say, warn

Tensors = Callable[[], Iterator[tuple[str, Tensor]]]


def find_checkpoint(checkpoints: Path, ranks: Ranks) -> Checkpoint | None:
    """The newest checkpoint that is whole. Rank 0 verifies; every rank has to call."""

    def look() -> Checkpoint | None:
        for name in remove_leftovers(checkpoints):
            warn(f"removed {name}, which a killed run left behind")
        return newest_whole(checkpoints, warn)

    return dist.first_does(ranks, look)


class TrainingState:
    """Saves and restores one engine and its average. Every rank has to call every method."""

    def __init__(
        self, checkpoints: Path, engine: Engine, ema: Ema | None, keep: CheckpointSection
    ) -> None:
        self.checkpoints, self.engine, self.ema, self.keep = checkpoints, engine, ema, keep
        self.ranks = engine.ranks

    @property
    def parameters(self) -> list[list[Any]]:
        """Name, shape and role. A list, as the order counts and JSON objects get sorted."""
        roles = self.engine.trainable.roles
        return [[name, list(self.engine.shape_of(name)), roles[name]] for name in roles]

    def save(self, step: int, facts: dict[str, Any]) -> None:
        """Gather one tensor at a time; rank 0 writes; one rename makes it a checkpoint."""
        shapes = {name: self.engine.shape_of(name) for name in self.engine.trainable.parameters}
        moments = {f"{key}/{name}": shape for name, shape in shapes.items() for key in MOMENTS}
        parts: list[tuple[str, dict[str, tuple[int, ...]], Tensors]] = [
            (TRAINABLE, shapes, self.engine.weights),
            (OPTIMIZER, moments, self.engine.moments),
        ]
        if self.ema is not None:
            parts.append((EMA, shapes, self.averages))
        facts = {**facts, "parameters": self.parameters, "updates": self.engine.num_updates}
        gathered = ((key, tensor) for _, _, tensors in parts for key, tensor in tensors())
        failure: UserError | None = None
        if self.ranks.first:
            wanted = {name: shapes for name, shapes, _ in parts}
            try:
                self.write(step, facts, wanted, gathered)
            except UserError as error:
                failure = error
        for _ in gathered:
            pass  # every rank takes part in every gather, also when nothing can be written
        dist.share_error(self.ranks, failure)

    def write(
        self,
        step: int,
        facts: dict[str, Any],
        files: dict[str, dict[str, tuple[int, ...]]],
        gathered: Iterator[tuple[str, Tensor]],
    ) -> None:
        """Rank 0's part of a save: the files, one after another, and the commit."""
        check_space(
            self.checkpoints,
            sum(4 * math.prod(shape) for shapes in files.values() for shape in shapes.values()),
        )
        with committing(self.checkpoints, step, facts) as staged:
            for name, shapes in files.items():
                infos = {key: TensorInfo("F32", shape) for key, shape in shapes.items()}
                with SafetensorsWriter(staged / name, infos) as writer:
                    for key, tensor in islice(gathered, len(shapes)):
                        writer.write(key, tensor.detach().float().cpu().contiguous())
        prune(self.checkpoints, self.keep.keep, self.keep.milestone)

    def averages(self) -> Iterator[tuple[str, Tensor]]:
        """The averaged weights, whole, one at a time."""
        assert self.ema is not None
        for name, shard in self.ema.shards.items():
            yield name, self.engine.whole(name, shard)

    def check(self, checkpoint: Checkpoint, facts: dict[str, Any]) -> None:
        """Refuse the checkpoint of another run; say what changed and may."""
        now = {**facts, "parameters": self.parameters}
        for line in compare_states(checkpoint, now):
            say(f"  changed since the checkpoint: {line}")

    def restore(self, checkpoint: Checkpoint) -> None:
        """Weights, average and AdamW's state, which has to exist: one step was taken before."""
        self.engine.set_weights(load_tensors(checkpoint.folder / TRAINABLE))
        self.engine.set_moments(
            load_tensors(checkpoint.folder / OPTIMIZER), checkpoint.state["updates"]
        )
        if self.ema is None:
            return
        source = EMA if (checkpoint.folder / EMA).exists() else TRAINABLE
        for name, whole in load_tensors(checkpoint.folder / source).items():
            self.ema.shards[name].copy_(self.engine.shard(name, whole))


# What may change between a run and its continuation. Everything else that enters a step may too,
# and is said: the rest of `finetune`, `data.text` and `data.caption_dropout`.
FREE_TO_CHANGE = {"micro_batch", "zero", "checkpoint", "preview", "timeout"}
REFUSED_TO_CHANGE = {"seed", "batch", "train", "model.text_length"}


def compare_states(checkpoint: Checkpoint, now: dict[str, Any]) -> list[str]:
    """Refuse a checkpoint of another run; list what changed and may."""
    then = checkpoint.state
    for part, what in (("lifted", "lifted model"), ("data", "training data")):
        if then["fingerprints"][part] != now["fingerprints"][part]:
            raise BadData(
                f"{checkpoint.folder}: made with another {what} "
                f"({brief(then['fingerprints'][part])}, here {brief(now['fingerprints'][part])}); "
                "use another `name`, or move the checkpoints away"
            )
    changed = [
        (key, then["recipe"].get(key), value)
        for key, value in now["recipe"].items()
        if then["recipe"].get(key) != value
    ]
    for key, old, new in changed:
        if key in REFUSED_TO_CHANGE:
            raise BadData(
                f"{checkpoint.folder}: made with {full(key)} {json.dumps(old)}, the recipe says "
                f"{json.dumps(new)}; that cannot change in a run: use another `name`"
            )
    if then["parameters"] != now["parameters"]:
        pairs = zip_longest(then["parameters"], now["parameters"])
        old, new = next((old, new) for old, new in pairs if old != new)
        raise BadData(
            f"{checkpoint.folder}: other parameters were trained, or in another order: "
            f"{old} there, {new} here"
        )
    return [
        f"{key} {json.dumps(old)} -> {json.dumps(new)}"
        for key, old, new in changed
        if key not in FREE_TO_CHANGE
    ]


def full(key: str) -> str:
    """The key as a recipe has it."""
    return key if "." in key else f"finetune.{key}"


def brief(fingerprint: str) -> str:
    return f"{fingerprint[:19]}..."
