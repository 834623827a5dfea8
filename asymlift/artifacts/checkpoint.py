"""Training state on disk: `checkpoints/step-000250/`, safetensors and JSON, one commit point.

A checkpoint is written beside its place and renamed when every byte is on disk. The newest one
whose files match its manifest is the truth; there is no `latest` file that could lie.
"""

import re
import shutil
import uuid
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from asymlift.artifacts.diffusers_folder import read_json
from asymlift.artifacts.files import (
    free_bytes,
    fsync_folder,
    human_bytes,
    write_bytes_atomically,
    writing,
)
from asymlift.artifacts.manifest import (
    canonical_json,
    check_manifest,
    read_manifest,
    write_manifest,
)
from asymlift.errors import BadData, CannotWrite

KIND = "checkpoint"
WRITING, REMOVING, REHEARSING = ".writing-", ".removing-", ".rehearsing-"  # never resumed from
TRAINABLE = "trainable.safetensors"
EMA = "ema.safetensors"
OPTIMIZER = "optimizer.safetensors"
STATE = "state.json"
FORMAT = 3
MOST_ALPHA = 1e30  # of adapters: what float32 still multiplies with
PARTS = {"parameters": list, "fingerprints": dict, "finetune": dict, "updates": int}


@dataclass(frozen=True)
class Checkpoint:
    """A complete one; `state` is its state.json."""

    folder: Path
    step: int
    state: dict[str, Any]


def step_folder(checkpoints: Path, step: int) -> Path:
    return checkpoints / f"step-{step:06d}"


def steps_on_disk(checkpoints: Path) -> list[int]:
    """The steps of all committed checkpoints, newest first; they are not verified here."""
    if not checkpoints.is_dir():
        return []
    found = (re.fullmatch(r"step-(\d{6,})", path.name) for path in checkpoints.iterdir())
    return sorted((int(match[1]) for match in found if match), reverse=True)


@contextmanager
def committing(
    checkpoints: Path, step: int, state: dict[str, Any], known: Mapping[str, str] | None = None
) -> Iterator[Path]:
    """Yield a folder to write into; it becomes the checkpoint of `step` when the block ends.

    `known`, which the block may fill, holds sha256s of files that need not be read again.
    """
    target = step_folder(checkpoints, step)
    staged = checkpoints / f"{WRITING}{step}-{uuid.uuid4().hex[:8]}"
    try:
        with writing(target):
            staged.mkdir(parents=True)
        yield staged
        body = canonical_json({"format": FORMAT, "step": step, **state})
        write_bytes_atomically(staged / STATE, body)
        write_manifest(staged, kind=KIND, facts={"step": step}, known=known)
        with writing(target):
            fsync_folder(staged)
            if target.exists():  # only a damaged one can be: the whole ones are resumed from
                discard(target)
            staged.rename(target)
            fsync_folder(checkpoints)
            for newer in steps_on_disk(checkpoints):
                if newer > step:  # damaged too; `prune` would keep it in place of this one
                    discard(step_folder(checkpoints, newer))
    except BaseException:
        shutil.rmtree(staged, ignore_errors=True)
        raise


def discard(folder: Path) -> None:
    """Take a folder out of sight at once, then delete it."""
    grave = folder.with_name(f"{REMOVING}{folder.name}-{uuid.uuid4().hex[:8]}")
    folder.rename(grave)
    delete(grave)


def delete(folder: Path) -> None:
    """A folder with all that is in it; of a link only the link."""
    if folder.is_symlink():
        folder.unlink()
    else:
        shutil.rmtree(folder)


def remove_leftovers(checkpoints: Path) -> list[str]:
    """Delete what a killed run left half written or half deleted."""
    if not checkpoints.is_dir():
        return []
    leftovers = [
        p for p in checkpoints.iterdir() if p.name.startswith((WRITING, REMOVING, REHEARSING))
    ]
    for path in leftovers:
        delete(path)
    return [path.name for path in leftovers]


def prune(checkpoints: Path, keep: int, milestone: int | None) -> None:
    """Delete all but the newest `keep` and the milestones."""
    for step in steps_on_disk(checkpoints)[keep:]:
        if milestone is None or step % milestone:
            discard(step_folder(checkpoints, step))


def open_checkpoint(folder: Path) -> Checkpoint:
    """Verify every byte, then read the state."""
    problems = check_manifest(folder)
    if problems:
        raise BadData(f"{folder}: " + "; ".join(problems[:3]))
    return read_checkpoint(folder)


def read_checkpoint(folder: Path) -> Checkpoint:
    """The state of a folder that is whole."""
    kind = read_manifest(folder).kind
    if kind != KIND:
        raise BadData(f"{folder}: a {kind}, not a checkpoint; move it away")
    state = read_json(folder / STATE)
    if state.get("format") != FORMAT:
        raise BadData(
            f"{folder}: format {state.get('format')}; this asymlift reads {FORMAT}: "
            "go on with the version that wrote it"
        )
    check_parts(folder, state, {"step": int, **{k: PARTS[k] for k in PARTS if k in state}})
    if not are_adapters(state.get("lora")):
        raise BadData(f"{folder / STATE}: `lora` is not as a checkpoint has it")
    return Checkpoint(folder, state["step"], state)


def are_adapters(lora: Any) -> bool:
    """Whether it is nothing, or a rank and a strength to merge adapters with."""
    if not isinstance(lora, dict):
        return lora is None
    rank, alpha = lora.get("rank"), lora.get("alpha")
    if type(rank) is not int or not isinstance(alpha, int | float):
        return False
    return rank > 0 and abs(alpha) < MOST_ALPHA  # false for NaN too


def check_parts(folder: Path, state: Mapping[str, Any], parts: Mapping[str, type]) -> None:
    """Refuse a state.json that somebody changed by hand; parts of a part are `outer.inner`."""
    for name, kind in parts.items():
        value: Any = state
        for key in name.split("."):
            if not isinstance(value, dict) or key not in value:
                raise BadData(f"{folder / STATE}: `{name}` is missing")
            value = value[key]
        if not isinstance(value, kind) or isinstance(value, bool):
            raise BadData(f"{folder / STATE}: `{name}` is not as a checkpoint has it")


def newest_whole(checkpoints: Path, warn: Callable[[str], None]) -> Checkpoint | None:
    """The newest checkpoint that verifies; every newer one that does not is named.

    None only where there are no checkpoints: damage must not make a run begin anew.
    """
    steps = steps_on_disk(checkpoints)
    for step in steps:
        folder = step_folder(checkpoints, step)
        problems = check_manifest(folder)
        if not problems:
            return read_checkpoint(folder)
        warn(f"checkpoint left out, it is damaged: {folder}: " + "; ".join(problems[:3]))
    if steps:
        raise BadData(
            f"{checkpoints}: all checkpoints in it are damaged; bring back a copy of one, "
            "or move them away to begin anew"
        )
    return None


def check_space(checkpoints: Path, needed: int) -> None:
    """Refuse to begin a save that cannot end; a fifth more than needed has to be free."""
    free = free_bytes(checkpoints)
    if free < needed * 1.2:
        raise CannotWrite(
            f"{checkpoints}: a checkpoint needs {human_bytes(needed * 1.2)}, "
            f"{human_bytes(free)} are free; free some space"
        )
