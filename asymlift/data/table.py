"""The index of a shard: where every part of every sample lies, in columns.

It is kept in a file beside the shard (`000000.tar` -> `000000.index.safetensors`), so that a shard
is scanned once. Columns take about 150 bytes a sample; records are made when they are asked for.
"""

import json
import os
import secrets
import zlib
from collections import Counter
from collections.abc import Collection, Container, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save

from asymlift.artifacts.files import write_bytes_atomically
from asymlift.artifacts.parsing import parse_json
from asymlift.data.pictures import BadPicture, image_size
from asymlift.data.records import (
    CAPTION,
    FACTS,
    IMAGE_SUFFIXES,
    LATENT,
    MOST_BYTES,
    MOST_TEXT,
    TEXT,
    BadSample,
    Part,
    Record,
    text_suffix,
)
from asymlift.data.tar import LARGEST, Damage, FileBlocks, scan, shown

FORMAT = 1
MISSING = "shard is missing"
MOST_CAPTIONS = 100  # of one image
KNOWN = {*IMAGE_SUFFIXES, CAPTION, FACTS, LATENT, TEXT, *map(text_suffix, range(MOST_CAPTIONS))}
HEADER_BYTES = 1 << 16  # of an image: enough to know its size, if it is not a strange one

Ints = NDArray[Any]
Span = tuple[int, int]
Gap = tuple[int, Damage]  # behind so many members of a sample


@dataclass(frozen=True)
class Table:
    """The usable samples of a shard, and what is wrong with the others."""

    path: Path
    blob: bytes  # the keys, one behind the other
    ends: Ints  # where each key ends in it
    sizes: Ints  # (n, 2): width and height; 0 where the image is unreadable
    spans: Mapping[str, Ints]  # suffix -> (n, 2): offset and size; offset -1 where there is none
    crcs: Mapping[str, Ints] = field(default_factory=dict)  # suffix -> (n,)
    faults: Sequence[BadSample] = ()
    facts: Mapping[str, Any] = field(default_factory=dict)  # bytes, mtime; sha256, made: see below

    def __len__(self) -> int:
        return len(self.ends)

    @property
    def made(self) -> dict[str, Any] | None:
        """What a prepared shard's latents, embeddings and sizes come from; None: not prepared."""
        return self.facts.get("made")

    def key(self, index: int) -> str:
        start = int(self.ends[index - 1]) if index else 0
        return self.blob[start : int(self.ends[index])].decode()

    def keys(self) -> list[str]:
        return [self.blob[a:b].decode() for a, b in pairwise([0, *self.ends.tolist()])]

    def where(self, index: int) -> str:
        return f"{self.path}!{self.key(index)}"

    def has(self, suffix: str) -> Ints:
        """(n,) whether each sample has such a part."""
        span = self.spans.get(suffix)
        return np.zeros(len(self), bool) if span is None else span[:, 0] >= 0

    def record(self, index: int, target: tuple[int, int] | None = None) -> Record:
        parts = {}
        for suffix, spans in self.spans.items():
            offset, size = spans[index].tolist()
            if offset >= 0:
                crc = self.crcs.get(suffix)
                known = None if crc is None else int(crc[index])
                parts[suffix] = Part(self.path, offset, size, known)
        width, height = self.sizes[index].tolist()
        return Record(self.key(index), self.where(index), parts, width, height, target)


@dataclass
class Row:
    """A sample on its way into a table."""

    key: str
    spans: dict[str, Span]
    width: int
    height: int
    crcs: dict[str, int] = field(default_factory=dict)


def table_of(
    path: Path, rows: Sequence[Row], faults: Sequence[BadSample], facts: Mapping[str, Any]
) -> Table:
    keys = [row.key.encode() for row in rows]
    suffixes = sorted({suffix for row in rows for suffix in row.spans})
    checked = sorted({suffix for row in rows for suffix in row.crcs})
    spans = {s: [row.spans.get(s, (-1, 0)) for row in rows] for s in suffixes}
    return Table(
        path,
        b"".join(keys),
        np.cumsum([len(key) for key in keys], dtype=np.int64),
        np.array([(row.width, row.height) for row in rows], np.int32).reshape(-1, 2),
        {suffix: np.array(column, np.int64).reshape(-1, 2) for suffix, column in spans.items()},
        {s: np.array([row.crcs.get(s, 0) for row in rows], np.uint32) for s in checked},
        list(faults),
        dict(facts),
    )


# ---- scanning a shard --------------------------------------------------------------------------


def index_shard(path: Path) -> Table:
    """Check every header and note where the parts lie; what is wrong becomes a fault.

    Damage costs the samples that it touches, no others.
    """
    try:
        with path.open("rb") as file:
            status = os.fstat(file.fileno())
            facts = {"bytes": status.st_size, "mtime": status.st_mtime_ns}
            found, faults = members_of(path, file.fileno(), status.st_size)
            rows = [
                Row(key, known_parts(spans), *size_in(file.fileno(), spans))
                for key, spans in found.items()
            ]
    except OSError as error:
        reason = MISSING if isinstance(error, FileNotFoundError) else "shard cannot be read"
        return table_of(path, [], [BadSample(str(path), reason, error.strerror or "")], {})
    return table_of(path, rows, faults, facts)


def known_parts(spans: Mapping[str, Span]) -> dict[str, Span]:
    return {suffix: span for suffix, span in spans.items() if suffix in KNOWN}


def members_of(
    path: Path, fd: int, length: int
) -> tuple[dict[str, dict[str, Span]], list[BadSample]]:
    """The spans of every usable sample, and the faults."""
    gathering = Gathering(str(path))
    for member in scan(FileBlocks(fd), gathering.note_damage, length=length):
        gathering.add(member.name, (member.offset, member.size), plain=member.plain)
    return gathering.finished()


class Gathering:
    """Members become samples; rules about names and neighbours are kept here."""

    def __init__(self, shard: str) -> None:
        self.shard = shard
        self.found: dict[str, dict[str, Span]] = {}
        self.wrong: dict[str, tuple[str, str]] = {}  # key -> the first thing wrong with it
        self.faults: list[BadSample] = []  # of the shard itself
        self.gaps: dict[str, list[Gap]] = {}  # of samples beside damage
        self.last = ""
        self.damage: Damage | None = None

    def note_damage(self, damage: Damage) -> None:
        if damage.name:  # cut off inside this member
            key, _ = split_name(damage.name)
            self.found.setdefault(key, {})
            self.wrong.setdefault(key, (damage.reason, damage.detail))
            return
        self.faults.append(BadSample(self.shard, damage.reason, damage.detail))
        if self.last:
            self.gaps.setdefault(self.last, []).append((len(self.found[self.last]), damage))
        self.damage = damage

    def add(self, name: str, span: Span, *, plain: bool = True) -> None:
        key, suffix = split_name(name)
        members = self.found.setdefault(key, {})
        if self.damage is not None:
            self.gaps.setdefault(key, []).append((len(members), self.damage))
            self.damage = None
        fault = fault_in_member(name, span[1], plain=plain, others=members)
        if key and members and key != self.last:
            fault = "duplicate key", "the members of a sample must follow each other"
        if fault is not None:
            self.wrong.setdefault(key or name, fault)
        members[suffix] = span
        self.last = key

    def finished(self) -> tuple[dict[str, dict[str, Span]], list[BadSample]]:
        habit = Habit()
        for key, members in self.found.items():
            if key not in self.gaps:
                habit.note(members)
        for key, members in self.found.items():
            gaps = self.gaps.get(key, [])
            if fault := habit.fault_beside_damage(members, gaps) or two_images(members):
                self.wrong.setdefault(key, fault)
        named = [
            BadSample(f"{self.shard}!{shown(key)}", *fault) for key, fault in self.wrong.items()
        ]
        usable = {k: spans for k, spans in self.found.items() if k and k not in self.wrong}
        return usable, self.faults + named


class Habit:
    """Which parts samples have, and in which order, to tell what damage took from others."""

    def __init__(self) -> None:
        self.orders = Counter[tuple[str, ...]]()

    def note(self, members: Iterable[str]) -> None:
        self.orders[tuple(members)] += 1

    def fault_beside_damage(
        self, members: Collection[str], gaps: Sequence[Gap]
    ) -> tuple[str, str] | None:
        """What a sample has lost; nothing where it only lacks what others have elsewhere."""
        for place, damage in gaps:
            if lost := self.lost(list(members), place):
                return damage.reason, f"{', '.join(lost)} lost, {damage.detail}"
        return None

    def lost(self, members: Sequence[str], place: int) -> list[str]:
        """The parts that most samples have, and that may have stood behind so many members."""
        counts = Counter[str]()
        for order, count in self.orders.items():
            counts.update(dict.fromkeys(order, count))
        usual = {s for s, n in counts.items() if n > self.orders.total() / 2 and s in KNOWN}
        return sorted(
            suffix
            for suffix in usual.difference(members)
            if not any(self.is_before(suffix, other) for other in members[:place])
            and not any(self.is_before(other, suffix) for other in members[place:])
        )

    def is_before(self, first: str, second: str) -> bool:
        """Whether wherever there are both they stand in this order."""
        found = [o.index(first) < o.index(second) for o in self.orders if {first, second} <= {*o}]
        return bool(found) and all(found)


def split_name(name: str) -> tuple[str, str]:
    """(key, suffix) of a member; folders belong to the key, whatever dots are in them."""
    folder, slash, base = name.rpartition("/")
    stem, _, rest = base.partition(".")
    return folder + slash + stem, f".{rest.lower()}"


def fault_in_member(
    name: str, size: int, *, plain: bool, others: Container[str]
) -> tuple[str, str] | None:
    """What is wrong with a member, beside others of its sample."""
    _, suffix = split_name(name)
    if fault := fault_in_name(name):
        return fault
    if not plain:
        return "not a plain file", name
    if suffix in others:
        return "duplicate suffix", suffix
    if size == 0 and suffix != CAPTION:
        return "empty member", suffix
    if size > most_bytes(suffix) and suffix in KNOWN:
        return "member is too large", f"{suffix}, {size} bytes"
    return None


def most_bytes(suffix: str) -> int:
    """Of one part of a sample."""
    return min(MOST_TEXT, MOST_BYTES) if suffix in (CAPTION, FACTS) else MOST_BYTES


def two_images(members: Container[str]) -> tuple[str, str] | None:
    images = [suffix for suffix in IMAGE_SUFFIXES if suffix in members]
    return ("two images", ", ".join(images)) if len(images) > 1 else None


def fault_in_name(name: str) -> tuple[str, str] | None:
    """Keys become parts of messages and file names, so nothing but a plain name is one."""
    stem, _, suffix = name.partition(".")
    if "/" in name or "\\" in name:
        return "key with a path in it", "pack the files without folders"
    if not name.isprintable():
        return "key with unprintable characters", ascii(name)
    if not stem or not suffix:
        return "member without key or suffix", name
    return None


def size_in(fd: int, spans: Mapping[str, Span]) -> tuple[int, int]:
    """(width, height) from the facts, else from the image's header, else zeros."""
    if FACTS in spans:
        offset, size = spans[FACTS]
        try:
            facts = json.loads(os.pread(fd, size, offset))
            width, height = facts["width"], facts["height"]
            if isinstance(width, int) and isinstance(height, int) and min(width, height) > 0:
                return (width, height) if max(width, height) < 1 << 31 else (0, 0)
        except (ValueError, KeyError, TypeError, RecursionError):
            pass  # facts that are no JSON are named when the sample is read
    for suffix in IMAGE_SUFFIXES:
        if suffix in spans:
            offset, size = spans[suffix]
            return picture_size(lambda count: os.pread(fd, count, offset), size)  # noqa: B023
    return 0, 0


def picture_size(read: Any, size: int) -> tuple[int, int]:
    """(width, height) of an image file, from its first bytes where they suffice; else zeros."""
    for count in (min(size, HEADER_BYTES), size):
        try:
            return image_size(read(count))
        except BadPicture:
            continue  # named when the sample is read
    return 0, 0


# ---- the file beside the shard -----------------------------------------------------------------


def index_path(shard: Path) -> Path:
    return shard.with_suffix(".index.safetensors")


def save_table(table: Table, path: Path) -> bytes:
    """Write an index so that it is whole or absent; returns its bytes."""
    columns: dict[str, Ints] = {
        "keys": np.frombuffer(table.blob, np.uint8),
        "ends": table.ends,
        "sizes": table.sizes,
        **{f"span{suffix}": column for suffix, column in table.spans.items()},
        **{f"crc{suffix}": column for suffix, column in table.crcs.items()},
    }
    shard = str(table.path)  # may be elsewhere when the index is read
    faults = [[f.where.removeprefix(shard), f.reason, f.detail, f.count] for f in table.faults]
    note: dict[str, Any] = {"format": FORMAT, "facts": dict(table.facts), "faults": faults}
    note["sum"] = summed(note, columns)
    data: bytes = save(columns, {"asymlift": json.dumps(note, sort_keys=True)})
    own = path.with_name(f".{path.name}.{secrets.token_hex(4)}")  # other ranks may write it too
    try:
        write_bytes_atomically(own, data)
        own.replace(path)
    finally:
        for left in (own, own.with_name(f"{own.name}.part")):
            left.unlink(missing_ok=True)
    return data


def load_table(shard: Path, path: Path) -> Table | None:
    """The index of a shard, or None where there is none, or a damaged one."""
    try:
        with safe_open(path, "np") as file:
            columns = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
            note = parse_json(file.metadata()["asymlift"])
        if note["format"] != FORMAT or note.pop("sum") != summed(note, columns):
            return None
        table = Table(
            shard,
            columns.pop("keys").tobytes(),
            columns.pop("ends"),
            columns.pop("sizes"),
            {name[4:]: column for name, column in columns.items() if name.startswith("span")},
            {name[3:]: column for name, column in columns.items() if name.startswith("crc")},
            [
                BadSample(f"{shard}{inside}", reason, detail, count=count)
                for inside, reason, detail, count in note["faults"]
            ],
            dict(note["facts"]),
        )
        return table if is_sound(table) else None
    except (OSError, SafetensorError, ValueError, KeyError, TypeError):
        return None


def is_sound(table: Table) -> bool:
    """Whether the columns fit one another: an index may come from anywhere, as its shard may."""
    count, keys = len(table), table.blob.decode()
    ends = np.concatenate([[0], table.ends])
    if table.ends.ndim != 1 or (np.diff(ends) <= 0).any() or ends[-1] != len(table.blob):
        return False
    if set(keys) & set("/\\") or not keys.isprintable() or table.sizes.shape != (count, 2):
        return False
    if any(column.shape != (count,) for column in table.crcs.values()):
        return False
    return all(
        column.shape == (count, 2)
        and bool((column >= [-1, 0]).all())
        and bool((column <= [LARGEST, most_bytes(suffix)]).all())
        for suffix, column in table.spans.items()
    )


def summed(note: Mapping[str, Any], columns: Mapping[str, Ints]) -> int:
    """crc32 of everything said: safetensors does not notice a flipped bit."""
    value = zlib.crc32(json.dumps(note, sort_keys=True).encode())
    for name in sorted(columns):
        column = np.ascontiguousarray(columns[name])
        value = zlib.crc32(f"{name} {column.dtype} {column.shape}".encode(), value)
        value = zlib.crc32(column.tobytes(), value)
    return value
