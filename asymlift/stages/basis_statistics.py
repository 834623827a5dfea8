"""The moments that a basis is fitted on: chunks of images, each a file that is whole or absent.

A chunk's moments depend on its images alone, and chunks are merged in one order, so neither the
number of ranks nor a kill changes a bit of the sum.

D pixel token width, d latent token width.
"""

import json
import math
import time
import zlib
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from asymlift.artifacts.files import write_bytes_atomically
from asymlift.artifacts.parsing import parse_json
from asymlift.data.ahead import read_ahead
from asymlift.data.pairs import PairReader
from asymlift.data.records import BadSample, Record
from asymlift.errors import BadData, StoppedEarly
from asymlift.families.base import Geometry
from asymlift.maths.moments import Moments, merge
from asymlift.runtime.log import Ticker, progress

CHUNK_IMAGES = 64  # what a kill costs at most, unless there are very many images
MOST_CHUNKS = 64  # beyond that chunks grow, so that their files take bounded space
TOKENS_PER_PRODUCT = 4096  # one matrix product for many small images
PATIENCE = 600.0  # seconds without news after which rank 0 does the other ranks' chunks
POLL = 0.2  # seconds between looks

Stop = Callable[[], bool]


@dataclass(frozen=True)
class Chunk:
    """A work unit: images whose moments become one file."""

    name: str
    records: Sequence[Record]


def cut(role: str, records: Sequence[Record], *, smallest: int = CHUNK_IMAGES) -> list[Chunk]:
    """Chunks that double from `smallest` on and stay small, unless there would be very many.

    From `smallest`, a power of two, on there is a border at every one, to read convergence at.
    """
    largest = max(CHUNK_IMAGES, 2 ** math.ceil(math.log2(len(records) / MOST_CHUNKS)))
    bounds = [0, smallest]
    while bounds[-1] < len(records):
        bounds.append(bounds[-1] + min(bounds[-1], largest))
    bounds[-1] = len(records)
    return [
        Chunk(f"{role}-{start:07d}-{stop:07d}", records[start:stop])
        for start, stop in pairwise(bounds)
    ]


class Statistics:
    """The chunks of one fit and their files, shared by all ranks."""

    def __init__(
        self,
        folder: Path,
        chunks: Sequence[Chunk],
        pairs: PairReader,
        geometry: Geometry,
        *,
        max_bad_fraction: float,
        workers: int = 0,
        device: str = "cpu",
        rank: int = 0,
        world: int = 1,
    ) -> None:
        self.folder, self.chunks, self.pairs, self.geometry = folder, chunks, pairs, geometry
        self.max_bad_fraction = max_bad_fraction
        self.workers, self.device = workers, torch.device(device)
        self.rank, self.world = rank, world
        self.num_samples = sum(len(chunk.records) for chunk in chunks)

    def make_share(self, stop: Stop) -> None:
        """This rank's chunks, the large ones spread evenly."""
        self.make(self.chunks[self.rank :: self.world], stop)

    def make(self, mine: Sequence[Chunk], stop: Stop) -> None:
        """Make the chunks that are not there yet."""
        self.folder.mkdir(parents=True, exist_ok=True)
        missing = [chunk for chunk in mine if self.read(chunk) is None]
        total = sum(len(chunk.records) for chunk in mine)
        to_do = sum(len(chunk.records) for chunk in missing)
        faults: list[BadSample] = []
        with progress("moments of images", total, total - to_do) as ticker:
            for number, chunk in enumerate(missing):
                if stop():
                    made = len(mine) - len(missing) + number
                    raise StoppedEarly(
                        f"stopped after {made} of {len(mine)} chunks; the same command goes on"
                    )
                moments, bad = self.moments_of(chunk, ticker)
                faults += bad
                check_budget(faults, self.num_samples, self.max_bad_fraction)
                try:
                    self.write(chunk, moments, bad)
                except FileNotFoundError:
                    if self.rank == 0:
                        raise
                    return  # rank 0 lost patience, did our chunks and cleaned up

    def moments_of(self, chunk: Chunk, ticker: Ticker) -> tuple[Moments, list[BadSample]]:
        """Sums over a chunk's tokens, many images per matrix product."""
        moments = Moments.zero(self.geometry.D, self.geometry.d, device=self.device)
        faults: list[BadSample] = []
        waiting: list[tuple[Tensor, Tensor]] = []
        num_waiting = 0
        for number, read in enumerate(read_ahead(self.tokens, chunk.records, self.workers), 1):
            if isinstance(read, BadSample):
                faults.append(read)
            else:
                waiting.append(read)
                num_waiting += len(read[0])
            if waiting and (num_waiting >= TOKENS_PER_PRODUCT or number == len(chunk.records)):
                x, z = (torch.cat(parts) for parts in zip(*waiting, strict=True))
                moments.add(x, z, len(waiting))
                waiting, num_waiting = [], 0
            ticker.tick()
        return moments, faults

    def tokens(self, record: Record) -> tuple[Tensor, Tensor] | BadSample:
        try:
            return self.pairs.tokens(record)
        except BadSample as fault:
            return fault

    def write(self, chunk: Chunk, moments: Moments, faults: Sequence[BadSample]) -> None:
        """Commit a chunk; two ranks that do so at once write the same bytes."""
        tensors = {name: tensor.cpu() for name, tensor in moments.tensors().items()}
        told = [[fault.where, fault.reason, fault.detail] for fault in faults]
        note = json.dumps({"checksum": checksum(tensors), "faults": told})
        own = self.folder / f".{chunk.name}.{self.rank}"
        write_bytes_atomically(own, save(tensors, {"asymlift": note}))
        own.replace(self.path(chunk))

    def read(self, chunk: Chunk) -> tuple[Moments, list[BadSample]] | None:
        """A chunk that is there and whole, else None."""
        try:
            with safe_open(self.path(chunk), "pt") as file:
                tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
                note = parse_json(file.metadata()["asymlift"])
            whole = note["checksum"] == checksum(tensors)
            faults = [BadSample(*fault) for fault in note["faults"]]
        except (OSError, SafetensorError, ValueError, KeyError, TypeError):
            return None
        return (Moments.from_tensors(tensors), faults) if whole else None

    def path(self, chunk: Chunk) -> Path:
        return self.folder / f"{chunk.name}.safetensors"

    def wait_for_others(self, stop: Stop) -> None:
        """Until every chunk is there; what does not come is made here."""
        missing = [chunk for chunk in self.chunks if not self.path(chunk).exists()]
        since = time.monotonic()
        while missing and time.monotonic() - since < PATIENCE and not stop():
            time.sleep(POLL)
            still = [chunk for chunk in missing if not self.path(chunk).exists()]
            if len(still) < len(missing):
                missing, since = still, time.monotonic()
        self.make(self.chunks, stop)  # also what was damaged on its way

    def running(self, some: Sequence[Chunk]) -> Iterator[tuple[Moments, list[BadSample]]]:
        """The moments and the faults up to each chunk, in chunk order."""
        moments, faults = (
            Moments.zero(self.geometry.D, self.geometry.d),
            list[BadSample](),
        )
        for chunk in some:
            found = self.read(chunk)
            assert found is not None, f"{chunk.name} has vanished"
            moments, faults = merge(moments, found[0]), faults + found[1]
            yield moments, faults

    def total(self, some: Sequence[Chunk]) -> tuple[Moments, list[BadSample]]:
        *_, last = self.running(some)
        return last


def checksum(tensors: dict[str, Tensor]) -> int:
    """crc32 of a chunk's numbers: safetensors does not notice a flipped bit."""
    value = 0
    for name in sorted(tensors):
        value = zlib.crc32(tensors[name].contiguous().view(-1).numpy().data, value)
    return value


def check_budget(faults: Sequence[BadSample], total: int, allowed: float) -> None:
    """Too many bad samples mean that something is wrong with all of them."""
    counted = reasons(faults)
    if counted.total() > allowed * total:
        listed = ", ".join(f"{reason} {count}" for reason, count in counted.most_common(3))
        raise BadData(
            f"{counted.total()} of {total} samples cannot be used ({listed}), allowed are "
            f"{allowed:.2%} (data.max_bad_fraction).\n"
            + "; ".join(str(fault) for fault in faults[:5])
        )


def reasons(faults: Sequence[BadSample]) -> Counter[str]:
    """Reason -> samples that are lost by it."""
    counted = Counter[str]()
    for fault in faults:
        counted[fault.reason] += fault.count
    return counted
