"""What there is to prepare, cut into shards: the same cut on every machine, at every start.

Pictures go to shards by the hash of their keys, so every shard is a random sample of the whole.
"""

import hashlib
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from asymlift.artifacts.files import write_bytes_atomically, writing
from asymlift.artifacts.manifest import canonical_json
from asymlift.artifacts.parsing import parse_json, read_small
from asymlift.data.ahead import read_ahead
from asymlift.data.catalog import Listed, Source, common_origin, expand, indexed, listed
from asymlift.data.records import BadSample, Record
from asymlift.data.table import Ints
from asymlift.errors import BadData, CannotWrite
from asymlift.recipe import Recipe

FORMAT = 1


class Work:
    """Every picture of the sources, in the order of the hashes of their keys."""

    def __init__(self, sources: Sequence[Source]) -> None:
        self.sources = list(sources)
        self.starts = np.cumsum([0, *(len(source) for source in self.sources)])
        self.faults = [fault for source in self.sources for fault in source.faults]
        self.made = common_origin(self.sources)
        self.order = self.in_hash_order()

    def __len__(self) -> int:
        return len(self.order)

    def record(self, place: int) -> Record:
        return self.record_of(int(self.order[place]))

    def record_of(self, number: int) -> Record:
        which = int(np.searchsorted(self.starts, number, side="right")) - 1
        return self.sources[which].record(number - int(self.starts[which]))

    def in_hash_order(self) -> Ints:
        """Numbers of the pictures; of two with one key the first stays."""
        keys = [key for source in self.sources for key in source.keys()]  # noqa: SIM118
        hashes = np.array(
            [
                int.from_bytes(hashlib.blake2b(key.encode(), digest_size=8).digest(), "big")
                for key in keys
            ],
            np.uint64,
        )
        order = np.argsort(hashes, kind="stable")
        kept, seen = list[int](), dict[str, int]()
        last = None
        for number in order.tolist():
            if hashes[number] != last:
                seen, last = {}, hashes[number]
            first = seen.setdefault(keys[number], number)
            if first == number:
                kept.append(number)
            else:
                detail = f"also {self.record_of(first).where}"
                self.faults.append(BadSample(self.record_of(number).where, "duplicate key", detail))
        return np.array(kept, np.int64)

    def digest(self) -> str:
        """Of every key, and of the size of every picture and caption."""
        digest = hashlib.sha256()
        for number in self.order.tolist():
            record = self.record_of(number)
            sizes = sorted((suffix, part.size) for suffix, part in record.parts.items())
            digest.update(f"{record.key} {sizes}\n".encode())
        return f"sha256:{digest.hexdigest()}"


def find_work(
    recipe: Recipe,
    on_done: Callable[[int], None] = lambda count: None,
    *,
    look_only: bool = False,
) -> Work:
    """List what `prepare.source` names; `look_only` leaves no index beside its shards."""
    assert recipe.prepare is not None
    named, sources = expand(recipe.prepare.source), list[Source]()
    index = partial(indexed, beside=not look_only)
    for table in read_ahead(index, named.shards, recipe.data.workers):
        sources.append(table)
        on_done(1)
    for path in named.listings:
        caption = recipe.data.caption
        sources.append(
            listed(
                path,
                labels=caption.labels,
                caption_lines=caption.lines,
                measure=False,
                on_done=on_done,
            )
        )
    prepared = [source.path for source in sources if source.made is not None]
    if prepared and len(prepared) < len(sources):
        other = next(source.path for source in sources if source.made is None)
        raise BadData(
            f"{prepared[0]} was prepared, {other} was not: prepare them apart, then data.train "
            "takes both"
        )
    work = Work(sources)
    if not len(work):
        first = [str(fault) for fault in work.faults[:3]]
        raise BadData("\n".join([f"{recipe.prepare.source}: nothing to prepare", *first]))
    return work


def class_names(work: Work) -> list[str]:
    """Class names by number, where the sources give labels."""
    names = [list(s.class_names) for s in work.sources if isinstance(s, Listed) and s.class_names]
    if any(other != names[0] for other in names[1:]):
        raise BadData("prepare.source: the sources number their classes differently; take one")
    return names[0] if names else []


def scratch(out: Path) -> Path:
    """The folder beside `out` that is there while its preparation is unfinished."""
    return out.with_name(f"{out.name}.unfinished")


def plan_path(out: Path) -> Path:
    return scratch(out) / "plan.json"


@dataclass(frozen=True)
class Layout:
    """Which samples go to which shard."""

    num_samples: int
    per_shard: int

    @property
    def num_shards(self) -> int:
        return -(-self.num_samples // self.per_shard)

    def places(self, shard: int) -> range:
        return range(shard * self.per_shard, min((shard + 1) * self.per_shard, self.num_samples))

    def path(self, out: Path, shard: int) -> Path:
        return out / f"{shard:06d}.tar"


def plan_for(settings: Mapping[str, Any], work: Work) -> dict[str, Any]:
    """Everything that the content of the shards follows from."""
    return {**settings, "pictures": len(work), "listing": work.digest(), "format": FORMAT}


def agreed_layout(out: Path, plan: Mapping[str, Any], per_shard: Callable[[], int]) -> Layout:
    """The layout of an earlier start or of another task; else a new one, written down.

    A start with other settings or other pictures is refused.
    """
    path = plan_path(out)
    if not path.exists():
        body = canonical_json({**plan, "per_shard": per_shard()})
        own = path.with_name(f"{path.name}.{os.uname().nodename}.{os.getpid()}")
        with writing(path):
            path.parent.mkdir(parents=True, exist_ok=True)
            write_bytes_atomically(own, body)
            try:
                path.hardlink_to(own)  # of several at once the first counts
            except FileExistsError:
                pass
            except OSError:  # a file system without hard links
                own.replace(path)
            finally:
                own.unlink(missing_ok=True)
    found = read_plan(path)
    refuse_others(out, found, plan)
    return Layout(int(plan["pictures"]), int(found["per_shard"]))


def read_plan(path: Path) -> dict[str, Any]:
    try:
        plan = parse_json(read_small(path))
        int(plan["per_shard"])
    except (OSError, ValueError, KeyError, TypeError):
        raise BadData(f"{path}: damaged; --overwrite begins anew") from None
    return dict(plan)


def refuse_others(out: Path, found: Mapping[str, Any], wanted: Mapping[str, Any]) -> None:
    """A start with other settings, or over other pictures, would mix two preparations."""
    differing = [name for name in wanted if found.get(name) != wanted[name]]
    if differing:
        name = differing[0]
        was, now = found.get(name), wanted[name]
        if isinstance(was, Mapping) and isinstance(now, Mapping):
            inner = next(key for key in (*now, *was) if was.get(key) != now.get(key))
            name, was, now = f"{name}.{inner}", was.get(inner), now.get(inner)
        raise CannotWrite(
            f"{out}: made with {TOLD.get(name, name)} {was}, now {now}.\n"
            "--overwrite begins anew; another prepare.out keeps both."
        )


TOLD = {"listing": "other pictures or captions,"}  # where a digest alone would tell nothing
