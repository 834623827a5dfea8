"""Going on from a checkpoint: which one, what it brings, and what the recipe may have changed."""

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import zip_longest
from pathlib import Path
from typing import Any, Literal

from asymlift.artifacts.checkpoint import (
    EMA,
    OPTIMIZER,
    STATE,
    TRAINABLE,
    Checkpoint,
    check_parts,
    newest_whole,
    open_checkpoint,
    remove_leftovers,
    steps_on_disk,
)
from asymlift.artifacts.files import human_bytes
from asymlift.artifacts.manifest import digest_json
from asymlift.artifacts.safetensors_stream import read_header
from asymlift.errors import BadData, CannotWrite
from asymlift.recipe import Recipe
from asymlift.runtime import dist
from asymlift.runtime.dist import Ranks
from asymlift.runtime.log import warn
from asymlift.stages.finetune.start import AUTO, NONE

Class = Literal["safe", "needs --allow-changes", "refused"]
SAFE: Class = "safe"
FLAG: Class = "needs --allow-changes"
REFUSED: Class = "refused"

# Every key of these sections has its place here, by itself or by a section around it. What a
# fingerprint tells better than a path (the lifted model, the samples and their order) is safe.
CLASSES: dict[str, Class] = {
    "model.base": SAFE,
    "model.family": SAFE,
    "model.text_length": REFUSED,
    "data.train": SAFE,
    "data.validation": SAFE,
    "data.cache": FLAG,
    "data.mode": FLAG,
    "data.resize": FLAG,
    "data.caption": FLAG,
    "data.text": SAFE,
    "data.caption_dropout": FLAG,
    "data.max_bad_fraction": SAFE,
    "data.workers": SAFE,
    "finetune.seed": REFUSED,
    "finetune.steps": SAFE,
    "finetune.batch": REFUSED,
    "finetune.micro_batch": SAFE,
    "finetune.precision": FLAG,
    "finetune.gradient_checkpointing": SAFE,
    "finetune.compile": SAFE,
    "finetune.train": REFUSED,
    "finetune.loss": FLAG,
    "finetune.time": FLAG,
    "finetune.optimizer.kind": FLAG,
    "finetune.optimizer.lr": SAFE,
    "finetune.optimizer.betas": SAFE,
    "finetune.optimizer.eps": SAFE,
    "finetune.optimizer.weight_decay": SAFE,
    "finetune.optimizer.momentum": SAFE,
    "finetune.optimizer.lr_scale": SAFE,
    "finetune.schedule": SAFE,
    "finetune.clip": SAFE,
    "finetune.ema.kind": FLAG,
    "finetune.ema.gamma": FLAG,
    "finetune.ema.decay": SAFE,
    "finetune.ema.from_step": FLAG,
    "finetune.ema.shard": SAFE,
    "finetune.zero": SAFE,
    "finetune.checkpoint": SAFE,
    "finetune.preview": SAFE,
    "finetune.validation": SAFE,
    "finetune.variance_every": SAFE,
    "finetune.trackers": SAFE,
    "finetune.max_skipped": SAFE,
    "finetune.timeout": SAFE,
    "fingerprints.lifted": REFUSED,
    "fingerprints.data": FLAG,
    "versions": SAFE,
}
SECTIONS = ("model", "data", "finetune", "fingerprints", "versions")
SAID = {
    "fingerprints.lifted": "the lifted model",
    "fingerprints.data": "the training data (from here on, samples come in another order)",
}
KEPT_AS = {"adamw": "adamw", "adamw_8bit": "adamw", "muon": "muon"}  # moments that are alike


# What going on reads of a state.json, beside what `sample` does.
NEEDED = {
    **dict.fromkeys(("updates", "samples", "seen", "bad", "not_finite", "ranks"), int),
    **dict.fromkeys(("model", "data", "finetune", "fingerprints", "versions"), dict),
    "parameters": list,
    "finetune.optimizer.kind": str,
    "finetune.zero.stage": int,
}

PATHS = (("model", "base"), ("data", "train"), ("data", "validation"), ("data", "cache"))


def recipe_facts(recipe: Recipe) -> dict[str, Any]:
    """The sections of a recipe that enter training. Of paths only a digest: artifacts travel."""
    whole = json.loads(recipe.model_dump_json())
    facts = {section: whole[section] for section in ("model", "data", "finetune")}
    for section, key in PATHS:
        given = facts[section][key]
        facts[section][key] = given and digest_json(given)[:19]
    return facts


# ---- which checkpoint ----------------------------------------------------------------------------


def find_checkpoint(checkpoints: Path, resume: str, ranks: Ranks) -> Checkpoint | None:
    """The one to go on from; None begins anew. Rank 0 verifies; every rank has to call."""

    def look() -> Checkpoint | None:
        for name in remove_leftovers(checkpoints):
            warn(f"removed {name}, which a killed run left behind")
        return chosen_checkpoint(checkpoints, resume)

    return dist.first_does(ranks, look)


def chosen_checkpoint(checkpoints: Path, resume: str) -> Checkpoint | None:
    """The one to go on from, with all that this needs in its state."""
    found = asked_for(checkpoints, resume)
    if found is not None:
        check_parts(found.folder, found.state, NEEDED)
        for parameter in found.state["parameters"]:
            if not is_parameter(parameter):
                raise BadData(
                    f"{found.folder / STATE}: `parameters` has {brief(parameter)}, which is no "
                    "[name, shape, role]"
                )
    return found


def is_parameter(value: Any) -> bool:
    match value:
        case [str(), list(shape), str()]:
            return all(isinstance(side, int) for side in shape)
    return False


def asked_for(checkpoints: Path, resume: str) -> Checkpoint | None:
    """`auto` takes the newest whole one, `none` none, a path the one that is there.

    Nothing that is newer is ever overwritten or pruned away.
    """
    if resume == AUTO:
        return newest_whole(checkpoints, warn)
    steps = steps_on_disk(checkpoints)
    if resume == NONE:
        if steps:
            raise CannotWrite(
                f"{checkpoints}: holds step {steps[0]}, and --resume none would begin anew;\n"
                "use another `name`, or move the checkpoints away"
            )
        return None
    folder = Path(resume)
    if not folder.is_dir():
        raise BadData(
            f"--resume {resume}: there is no such checkpoint; give a folder such as "
            f"{checkpoints / 'step-000250'}, or auto"
        )
    inside = steps_on_disk(folder / checkpoints.name) or steps_on_disk(folder)
    if inside:
        raise BadData(
            f"--resume {resume}: holds checkpoints, and is none; give one of them, such as "
            f"step-{inside[0]:06d}"
        )
    found = open_checkpoint(folder)
    own = folder.resolve().parent == checkpoints.resolve()
    lost = [step for step in steps if step > found.step] if own else steps
    if lost:
        what = f"newer step {lost[0]}" if own else f"step {lost[0]} of this run"
        raise CannotWrite(
            f"--resume {resume}: {checkpoints} holds {what}, which would be lost;\n"
            "use another `name`, move it away, or leave --resume out to go on from it"
        )
    return found


# ---- what changed --------------------------------------------------------------------------------


@dataclass(frozen=True)
class Change:
    """One value that is not what it was when the checkpoint was written."""

    key: str
    old: str
    new: str
    verdict: Class

    def __str__(self) -> str:
        return f"{SAID.get(self.key, self.key)} {self.old} -> {self.new}"


def find_changes(then: Mapping[str, Any], now: Mapping[str, Any]) -> list[Change]:
    """What differs between two states, by key; sections that come or go count as one value."""
    found = [
        Change(key, brief(old), brief(new), class_of(key))
        for section in SECTIONS
        for key, old, new in differences(section, then.get(section), now.get(section))
    ]
    return sorted(found, key=lambda change: -SEVERITY[change.verdict])


SEVERITY = {SAFE: 0, FLAG: 1, REFUSED: 2}


def differences(key: str, old: Any, new: Any) -> Iterator[tuple[str, Any, Any]]:
    if isinstance(old, dict) and isinstance(new, dict):
        for name in dict.fromkeys((*new, *old)):
            yield from differences(f"{key}.{name}", old.get(name), new.get(name))
    elif old != new:
        yield key, old, new


def class_of(key: str) -> Class:
    """The class of a key, or the strictest of a section that came or went as a whole."""
    parts = key.split(".")
    for length in range(len(parts), 0, -1):
        if (found := CLASSES.get(".".join(parts[:length]))) is not None:
            return found
    return max((CLASSES[k] for k in CLASSES if k.startswith(f"{key}.")), key=SEVERITY.__getitem__)


def brief(value: Any) -> str:
    text = value if isinstance(value, str) else json.dumps(value)
    return f"{text[:60]}..." if len(text) > 63 else text


def check_changes(checkpoint: Checkpoint, now: Mapping[str, Any], *, allowed: bool) -> list[Change]:
    """Refuse the checkpoint of another run; list what changed and may."""
    then, folder = checkpoint.state, checkpoint.folder
    changes = find_changes(then, now)
    for change in changes:
        if change.verdict == REFUSED:
            raise BadData(
                f"{folder}: {change};\nthat cannot change in a run: use another `name`, or set it "
                "back"
            )
    if then["parameters"] != now["parameters"]:
        pairs = zip_longest(then["parameters"], now["parameters"])
        old, new = next((old, new) for old, new in pairs if old != new)
        raise BadData(
            f"{folder}: other parameters were trained, or in another order: {old} there, {new} here"
        )
    kinds = [state["finetune"]["optimizer"]["kind"] for state in (then, now)]
    if KEPT_AS.get(kinds[0]) != KEPT_AS[kinds[1]]:
        raise BadData(
            f"{folder}: finetune.optimizer.kind {kinds[0]} -> {kinds[1]};\n"
            f"{kinds[1]} cannot go on from what {kinds[0]} remembers: use another `name`"
        )
    flagged = [change for change in changes if change.verdict == FLAG]
    if flagged and not allowed:
        raise BadData(
            f"{folder}: what is trained is no longer the same: "
            f"{'; '.join(map(str, flagged))}\n"
            "to go on like that, add --allow-changes; to begin anew, use another `name`"
        )
    return changes


# ---- what is restored ----------------------------------------------------------------------------


def restored_rows(
    checkpoint: Checkpoint, now: Mapping[str, Any], changes: Sequence[Change]
) -> list[tuple[str, str, str]]:
    """What the checkpoint brings, and what changed since: for a table."""
    then = checkpoint.state
    updates = then["updates"]
    rows = [
        ("step", f"{checkpoint.step} of {now['finetune']['steps']}", ""),
        ("samples", f"{then['samples']:,}", ""),
        ("weights", contents(checkpoint.folder / TRAINABLE), ""),
        ("average", average_row(checkpoint, now), ""),
        ("optimizer", f"{contents(checkpoint.folder / OPTIMIZER)}, {updates} updates", ""),
        ("ledger", f"{then['seen']:,} samples read, {then['bad']:,} of them bad", ""),
        ("layout", f"{layout(then)} -> {layout(now)}", ""),
    ]
    rows += [(c.key, f"{c.old} -> {c.new}", verdict_row(c)) for c in changes]
    return rows


def verdict_row(change: Change) -> str:
    return "allowed by --allow-changes" if change.verdict == FLAG else change.verdict


def contents(path: Path) -> str:
    tensors = read_header(path).tensors
    size = sum(info.num_bytes for info in tensors.values())
    return f"{len(tensors)} tensors, {human_bytes(size)}"


def average_row(checkpoint: Checkpoint, now: Mapping[str, Any]) -> str:
    there = (checkpoint.folder / EMA).exists()
    if now["finetune"]["ema"] is None:
        return "left behind" if there else "none"
    return contents(checkpoint.folder / EMA) if there else "begins with the weights"


def layout(state: Mapping[str, Any]) -> str:
    world, stage = state["ranks"], state["finetune"]["zero"]["stage"]
    return f"ZeRO {stage} on {world} rank{'' if world == 1 else 's'}"
