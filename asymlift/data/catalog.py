"""A catalog: every usable sample of shards, folders and tables, as one sequence of records.

Shards are indexed once, into a file beside them (or in a cache folder where that cannot be
written); pictures in folders are listed and measured. Nothing is decoded here but what cannot be
measured, to say why.
"""

import hashlib
import heapq
import os
from bisect import bisect_right
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from glob import glob
from itertools import pairwise
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from asymlift.data.ahead import read_ahead
from asymlift.data.braces import expand_braces
from asymlift.data.buckets import (
    Bucket,
    Fit,
    Refusal,
    place,
    places,
    suggestion,
    whole_patches,
)
from asymlift.data.listing import UNNAMED, list_pictures
from asymlift.data.reader import Reader
from asymlift.data.records import IMAGE_SUFFIXES, LATENT, BadSample, Part, Record
from asymlift.data.table import (
    Ints,
    Table,
    index_path,
    index_shard,
    load_table,
    picture_size,
    save_table,
)
from asymlift.data.tar import CUT_OFF
from asymlift.errors import BadData, UserError

Patterns = str | Path | Sequence[str | Path]

TABLES = (".jsonl", ".csv", ".parquet")
UNREADABLE, NO_IMAGE = "image cannot be read", "no image"
TOO_SMALL = "too small"


# ---- what is named -----------------------------------------------------------------------------


@dataclass(frozen=True)
class Named:
    """What a recipe's patterns stand for."""

    shards: list[Path]
    listings: list[Path]  # folders of pictures, and tables


def expand(patterns: Patterns) -> Named:
    """`train/{000000..000119}.tar`, `train/*.tar`, a folder, a table of pictures, or a list.

    What exists under the very name that is given is meant, whatever marks are in it.
    """
    shards, listings = list[Path](), list[Path]()
    for pattern in [patterns] if isinstance(patterns, str | Path) else patterns:
        if "://" in str(pattern) or str(pattern).startswith("pipe:"):
            raise BadData(
                f"{pattern}: only files can be read in any order; `asymlift finetune` takes others "
                "with data.mode: stream, every other command needs some shards as files"
            )
        names = [str(pattern)] if Path(pattern).exists() else expand_braces(str(pattern))
        for name in names:
            exact = Path(name).exists() or not any(mark in name for mark in "*?[")
            found = [name] if exact else sorted(glob(name))  # noqa: PTH207
            if not found:
                raise BadData(f"{name}: no shard matches this pattern")
            for path in map(Path, found):
                if path.is_dir() and (inside := shards_in(path)):
                    shards += inside
                elif path.is_dir() or path.suffix.lower() in TABLES:
                    listings.append(path)
                else:
                    shards.append(path)
    for paths in (shards, listings):
        twice, count = Counter(paths).most_common(1)[0] if paths else (Path(), 1)
        if count > 1:
            raise BadData(f"{twice}: this is listed twice")
    if shards and not any(path.is_file() for path in shards):
        kind = "shard" if shards[0].suffix == ".tar" else "file or folder"
        raise BadData(f"{shards[0]}: there is no such {kind}; is the path or range right?")
    return Named(shards, listings)


def shards_in(folder: Path) -> list[Path]:
    return sorted(path for path in folder.glob("*.tar") if not path.name.startswith("."))


# ---- shards ------------------------------------------------------------------------------------


def cached_index_path(shard: Path) -> Path:
    """Where the index of a shard goes whose own folder cannot be written."""
    base = os.environ.get("ASYMLIFT_CACHE") or os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    name = hashlib.sha256(str(shard.absolute()).encode()).hexdigest()[:24]
    return Path(base).expanduser() / "asymlift" / "index" / f"{name}.safetensors"


def indexed(shard: Path, *, beside: bool = True) -> Table:
    """The index of a shard: the one that is kept if it fits, else a new one, which is kept.

    Not `beside` the shard but in the cache alone where one only looks.
    """
    try:
        status = shard.stat()
    except OSError:
        return index_shard(shard)
    places = [index_path(shard), cached_index_path(shard)]
    for path in places:
        table = load_table(shard, path)
        if table is None:
            continue
        prepared = "sha256" in table.facts
        if table.facts.get("bytes") == status.st_size:
            if prepared or table.facts.get("mtime") == status.st_mtime_ns:
                return table
        elif prepared:
            return cut_to(table, status.st_size)
    table = index_shard(shard)
    for path in places if beside else places[1:]:
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            save_table(table, path)
            break
        except (OSError, UserError):
            continue  # a read-only folder: the next place, or none
    return table


def cut_to(table: Table, size: int) -> Table:
    """A prepared shard that is not as long as it was written: what lies beyond is lost."""
    ends = np.zeros(len(table), np.int64)
    for column in table.spans.values():
        ends = np.maximum(ends, column.sum(1))
    kept = np.flatnonzero(ends <= size)
    lost = len(table) - len(kept)
    was = f"{size} bytes, written with {table.facts['bytes']}"
    reason = CUT_OFF if size < table.facts["bytes"] else "shard changed since it was indexed"
    fault = BadSample(str(table.path), reason, was, count=max(lost, 1))
    return select(table, kept, fault)


def select(table: Table, kept: Ints, *faults: BadSample) -> Table:
    """Some of a table's samples, and more faults."""
    keys = [table.key(int(i)).encode() for i in kept]
    return replace(
        table,
        blob=b"".join(keys),
        ends=np.cumsum([len(key) for key in keys], dtype=np.int64),
        sizes=table.sizes[kept],
        spans={suffix: column[kept] for suffix, column in table.spans.items()},
        crcs={suffix: column[kept] for suffix, column in table.crcs.items()},
        faults=[*table.faults, *faults],
    )


# ---- folders and tables of pictures ------------------------------------------------------------


@dataclass(frozen=True)
class Listed:
    """Pictures that lie about, measured."""

    path: Path
    records: list[Record]
    sizes: Ints
    faults: Sequence[BadSample]
    class_names: Sequence[str] = ()
    facts: Mapping[str, Any] = field(default_factory=dict)
    made: None = None

    def __len__(self) -> int:
        return len(self.records)

    def key(self, index: int) -> str:
        return self.records[index].key

    def keys(self) -> list[str]:
        return [record.key for record in self.records]

    def where(self, index: int) -> str:
        return self.records[index].where

    def has(self, suffix: str) -> Ints:
        return np.array([suffix in record.parts for record in self.records], bool)

    def record(self, index: int, target: tuple[int, int] | None = None) -> Record:
        return replace(self.records[index], target=target)


def listed(
    path: Path,
    *,
    labels: str | None = None,
    caption_lines: bool = False,
    workers: int = 0,
    measure: bool = True,
    on_done: Callable[[int], None] = lambda count: None,
) -> Listed:
    """The pictures of a folder or a table; `measure` reads the head of each."""
    faults: list[BadSample] = []
    found = list_pictures(
        path,
        labels=labels,
        caption_lines=caption_lines,
        on_bad=faults.append,
        on_done=on_done if not measure else lambda count: None,
    )
    records = found.records
    if measure:
        measured = list[Record]()
        for record in read_ahead(with_size, records, workers):
            measured.append(record)
            on_done(1)
        records = measured
    sizes = np.array([(r.width, r.height) for r in records], np.int32).reshape(-1, 2)
    return Listed(path, records, sizes, faults, found.class_names, {"about": found.about})


def with_size(record: Record) -> Record:
    part = record.parts[record.image_suffix or ""]
    try:
        width, height = picture_size(partial(head_of, part), part.size)
    except OSError:
        width, height = 0, 0  # named when the sample is read
    return replace(record, width=width, height=height)


def head_of(part: Part, count: int) -> bytes:
    if part.inline is not None:
        return part.inline[:count]
    assert part.path is not None
    with part.path.open("rb", buffering=0) as file:
        return file.read(count)


class Source(Protocol):
    """Samples from one place: a shard's table, a list of pictures, or either with a newer cache."""

    @property
    def path(self) -> Path: ...

    @property
    def sizes(self) -> Ints: ...  # (n, 2): width and height of the image as stored; 0 if unreadable

    @property
    def faults(self) -> Sequence[BadSample]: ...

    @property
    def facts(self) -> Mapping[str, Any]: ...

    @property
    def made(self) -> dict[str, Any] | None: ...

    def __len__(self) -> int: ...

    def key(self, index: int) -> str: ...

    def keys(self) -> list[str]: ...

    def where(self, index: int) -> str: ...

    def has(self, suffix: str) -> Ints: ...

    def record(self, index: int, target: tuple[int, int] | None = None) -> Record: ...


# ---- the catalog -------------------------------------------------------------------------------


class Catalog(Sequence[Record]):
    """The usable samples of all sources, each with the size at which the model sees it."""

    def __init__(self, sources: Sequence[Source], fit: Fit) -> None:
        self.sources, self.fit = list(sources), fit
        self.starts = np.cumsum([0, *(len(source) for source in self.sources)])
        found = with_counts(self.sources)
        self.faults = [fault for fault in found if fault.reason != UNNAMED]
        # Nothing is wrong with these: of a size that is not trained on, or left out by a table.
        self.refused = [fault for fault in found if fault.reason == UNNAMED]
        self.made = common_origin(self.sources)
        targets = [self.targets_of(source) for source in self.sources]
        self.targets: Ints = np.concatenate(targets) if targets else np.zeros((0, 2), np.int32)
        usable = self.targets[:, 0] > 0
        self.drop_duplicates(usable)
        self.chosen = np.flatnonzero(usable)
        self.targets = self.targets[self.chosen]

    def __len__(self) -> int:
        return len(self.chosen)

    def __getitem__(self, index: Any) -> Any:
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        source, inside = self.place_of(int(self.chosen[index]))
        height, width = self.targets[index]
        return source.record(inside, (int(height), int(width)))

    def __iter__(self) -> Iterator[Record]:
        return (self[index] for index in range(len(self)))

    def place_of(self, number: int) -> tuple[Source, int]:
        which = bisect_right(self.starts, number) - 1
        return self.sources[which], number - int(self.starts[which])

    def keys(self) -> Iterator[str]:
        cuts = np.searchsorted(self.chosen, self.starts).tolist()
        for source, start, (a, b) in zip(self.sources, self.starts, pairwise(cuts), strict=False):
            known = source.keys()
            yield from (known[inside] for inside in (self.chosen[a:b] - start).tolist())

    def has(self, suffix: str) -> Ints:
        """(n,) whether each sample has such a part."""
        columns = [source.has(suffix) for source in self.sources]
        return np.concatenate(columns)[self.chosen] if columns else np.zeros(0, bool)

    @property
    def num_lost(self) -> int:
        return sum(fault.count for fault in self.faults)

    @property
    def num_listed(self) -> int:
        """Samples that there are, or would be if nothing were damaged."""
        return len(self) + len(self.refused) + self.num_lost

    def targets_of(self, source: Source) -> Ints:
        """(n, 2): height and width that the model sees; 0 for what is left out.

        A picture that was prepared, or whose latent is cached, keeps its size.
        """
        patch, sizes = self.fit.patch, source.sizes[:, ::-1]
        whole = np.where(sizes.min(1, keepdims=True) < patch, 0, sizes // patch * patch)
        as_stored = source.has(LATENT) | (source.made is not None)
        targets: Ints = np.where(as_stored[:, None], whole, places(source.sizes, self.fit))
        no_image = ~np.any([source.has(suffix) for suffix in IMAGE_SUFFIXES], axis=0)
        targets[no_image] = 0  # a cache knows the size of pictures that it does not hold
        for index in np.flatnonzero(targets[:, 0] == 0).tolist():
            where, (width, height) = source.where(index), source.sizes[index].tolist()
            if no_image[index]:
                self.faults.append(BadSample(where, NO_IMAGE))
            elif not width:
                self.faults.append(why_unreadable(source.record(index)))
            elif as_stored[index]:
                self.faults.append(refused(where, whole_patches(width, height, patch)))
            else:
                self.refused.append(refused(where, place(width, height, self.fit)))
        return targets

    def drop_duplicates(self, usable: Ints) -> None:
        """A key may occur once; the first one counts."""
        numbers = np.flatnonzero(usable)
        hashes = np.fromiter(
            (hash(key) for source in self.sources for key in source.keys()),  # noqa: SIM118
            np.int64,
            int(self.starts[-1]),
        )[numbers]
        order = np.argsort(hashes, kind="stable")
        same = np.flatnonzero(np.diff(hashes[order]) == 0)
        first: dict[str, Source] = {}
        for number in np.unique(numbers[order[np.concatenate([same, same + 1])]]).tolist():
            source, inside = self.place_of(number)
            known = first.setdefault(source.key(inside), source)
            if known is not source:
                usable[number] = False
                detail = f"also in {known.path}"
                self.faults.append(BadSample(source.where(inside), "duplicate key", detail))

    def digest(self) -> str:
        """Which samples, in which order, of which size: all that the order of training needs."""
        digest = hashlib.sha256()
        for key in self.keys():
            digest.update(f"{key}\n".encode())
        digest.update(np.ascontiguousarray(self.targets, np.int32).tobytes())
        return f"sha256:{digest.hexdigest()}"

    def lowest_hashes(self, count: int) -> list[Record]:
        """A sample of the samples that depends on nothing but their keys, in an order likewise."""

        def place_in_line(item: tuple[int, str]) -> tuple[bytes, str]:
            return hashlib.sha256(item[1].encode()).digest(), item[1]

        lowest = heapq.nsmallest(count, enumerate(self.keys()), key=place_in_line)
        return [self[index] for index, _ in lowest]

    def nothing_left(self, what: Any) -> BadData:
        """Why there is no sample at all, and what to do."""
        too_small = [fault for fault in self.refused if fault.reason == TOO_SMALL]
        if too_small:
            sizes = np.concatenate([source.sizes for source in self.sources])
            readable = sizes[sizes[:, 0] > 0]
            return BadData(f"{what}: {too_small[0]}\n{suggestion(readable, self.fit)}")
        if self.made is not None and all(fault.reason == NO_IMAGE for fault in self.faults):
            return BadData(
                f"{what}: holds latents or embeddings without pictures; data.cache is the place "
                "for it, and data.train for the pictures"
            )
        first = [*self.faults, *self.refused][:3]
        return BadData("\n".join([f"{what}: there are no usable samples", *map(str, first)]))


def refused(where: str, refusal: Bucket | Refusal) -> BadSample:
    assert isinstance(refusal, Refusal), where
    return BadSample(where, refusal.reason, refusal.detail)


def why_unreadable(record: Record) -> BadSample:
    """What is wrong with an image whose size could not be told."""
    try:
        Reader().stored_image(record)
    except BadSample as fault:
        return fault
    return BadSample(record.where, UNREADABLE)


def with_counts(sources: Sequence[Source]) -> list[BadSample]:
    """All faults; a shard that cannot be read counts as many samples as the others hold."""
    sizes = [len(source) for source in sources if len(source)]
    usual = round(sum(sizes) / len(sizes)) if sizes else 1
    faults = []
    for source in sources:
        for fault in source.faults:
            whole = not len(source) and fault.where == str(source.path)
            weight = max(usual, fault.count) if whole else fault.count
            faults.append(BadSample(fault.where, fault.reason, fault.detail, count=weight))
    return faults


def common_origin(sources: Sequence[Source]) -> dict[str, Any] | None:
    """What every prepared source says that it was made with; two that differ are refused."""
    found = [(source.path, source.made) for source in sources if source.made is not None]
    if not found:
        return None
    path, made = found[0]
    for other, said in found[1:]:
        for name in sorted({*made, *said}):
            if made.get(name) != said.get(name):
                raise BadData(
                    f"{other} was prepared with {name} {said.get(name)},\n{path} with "
                    f"{made.get(name)}: shards of one run must be made alike"
                )
    return made


def open_catalog(
    patterns: Patterns,
    fit: Fit,
    *,
    labels: str | None = None,
    caption_lines: bool = False,
    workers: int = 0,
    on_done: Callable[[int], None] = lambda count: None,
) -> Catalog:
    """Everything that the patterns name, indexed where it is not yet."""
    named = expand(patterns)
    sources = list[Source]()
    for table in read_ahead(indexed, named.shards, workers):
        sources.append(table)
        on_done(1)
    for path in named.listings:
        sources.append(listed(path, labels=labels, caption_lines=caption_lines, workers=workers))
    return Catalog(sources, fit)
