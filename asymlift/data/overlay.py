"""Newer latents or embeddings for the same samples, in shards of their own (`data.cache`).

So a new VAE or text encoder costs a new cache, and no picture is written again.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from asymlift.data.catalog import Listed, Source, common_origin, select
from asymlift.data.records import IMAGE_SUFFIXES, BadSample, Record
from asymlift.data.table import Ints, Table
from asymlift.errors import BadData

NOT_CACHED = "not in data.cache"


@dataclass(frozen=True)
class Caches:
    """Tables of cached parts, found by key."""

    tables: Sequence[Table]
    hashes: Ints  # of all keys, sorted
    places: Ints  # (n, 2): table and index of each
    made: Mapping[str, Any]

    def find(self, keys: Sequence[str]) -> Ints:
        """(n, 2): table and index of every key; -1 where there is none."""
        wanted = np.fromiter(map(hash, keys), np.int64, len(keys))
        if not len(self.hashes):
            return np.full((len(keys), 2), -1)
        at = np.searchsorted(self.hashes, wanted).clip(max=len(self.hashes) - 1)
        found: Ints = np.where((self.hashes[at] == wanted)[:, None], self.places[at], -1)
        for index in np.flatnonzero(found[:, 0] >= 0).tolist():
            table, inside = found[index].tolist()
            if self.tables[table].key(inside) != keys[index]:  # two keys with one hash
                found[index] = -1
        return found


def caches_of(tables: Sequence[Table]) -> Caches:
    """All tables as one; they have to be made alike, and hold no pictures."""
    made = common_origin(tables)
    if made is None:
        raise BadData(
            f"data.cache: {tables[0].path if tables else 'no shard'} does not say what it was made "
            "with; make it with `asymlift prepare` and prepare.image none"
        )
    for table in tables:
        if any(table.has(suffix).any() for suffix in IMAGE_SUFFIXES):
            raise BadData(
                f"data.cache: {table.path} holds pictures; data.train is the place for it"
            )
    keys = [key for table in tables for key in table.keys()]  # noqa: SIM118
    hashes = np.fromiter(map(hash, keys), np.int64, len(keys))
    sizes = [len(table) for table in tables]
    which = np.repeat(np.arange(len(tables)), sizes)
    inside = np.concatenate([np.arange(size) for size in sizes]) if sizes else which
    order = np.argsort(hashes, kind="stable")
    return Caches(tables, hashes[order], np.stack([which, inside], 1)[order], made)


@dataclass(frozen=True)
class Overlaid:
    """A source whose samples take their latents, embeddings or both from caches."""

    base: Table | Listed
    caches: Caches
    places: Ints  # (n, 2): table and index in the caches

    def __len__(self) -> int:
        return len(self.base)

    @property
    def path(self) -> Path:
        return self.base.path

    @property
    def sizes(self) -> Ints:
        return self.base.sizes

    @property
    def faults(self) -> Sequence[BadSample]:
        return self.base.faults

    @property
    def facts(self) -> Mapping[str, Any]:
        return self.base.facts

    @property
    def made(self) -> dict[str, Any]:
        return {**(self.base.made or {}), **self.caches.made}

    def key(self, index: int) -> str:
        return self.base.key(index)

    def keys(self) -> list[str]:
        return self.base.keys()

    def where(self, index: int) -> str:
        return self.base.where(index)

    def has(self, suffix: str) -> Ints:
        """(n,) whether each sample has such a part, here or there."""
        found = self.base.has(suffix)
        for number, table in enumerate(self.caches.tables):
            mine = np.flatnonzero(self.places[:, 0] == number)
            found[mine] |= table.has(suffix)[self.places[mine, 1]]
        return found

    def record(self, index: int, target: tuple[int, int] | None = None) -> Record:
        record = self.base.record(index, target)
        table, inside = self.places[index].tolist()
        newer = self.caches.tables[table].record(inside)
        return replace(record, parts={**record.parts, **newer.parts})


def overlaid(source: Table | Listed, caches: Caches) -> Source:
    """A source with its cached parts; a sample without them is left out, so that none is older."""
    places = caches.find(source.keys())
    kept = np.flatnonzero(places[:, 0] >= 0)
    if len(kept) < len(source):
        lost = np.setdiff1d(np.arange(len(source)), kept)
        detail = f"{len(lost)} samples, the first is {source.key(int(lost[0]))}"
        fault = BadSample(str(source.path), NOT_CACHED, detail, count=len(lost))
        if isinstance(source, Table):
            source = select(source, kept, fault)
        else:
            records = [source.records[index] for index in kept.tolist()]
            faults = [*source.faults, fault]
            source = replace(source, records=records, sizes=source.sizes[kept], faults=faults)
    return Overlaid(source, caches, places[kept])
