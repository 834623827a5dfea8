"""Samples in training order, read ahead by threads; what is broken becomes an empty slot."""

import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from concurrent.futures import TimeoutError as NotYet
from dataclasses import dataclass, field
from functools import partial
from types import TracebackType
from typing import Protocol, Self

from asymlift.data.captions import Choice, chosen_caption
from asymlift.data.catalog import Catalog
from asymlift.data.order import EMPTY, Order
from asymlift.data.reader import Reader
from asymlift.data.records import BadSample, Record, Sample

READ_AHEAD = 2  # steps
SLOW = 60.0  # seconds without a sample after which it is named
PATIENCE = 300.0  # and after which it is given up

Check = Callable[[Record, Sample], None]  # raises BadSample where a sample does not fit the model


@dataclass
class StepSamples:
    """What one rank trains on in one step: per micro-batch, a sample or None per slot."""

    epoch: int
    micro_batches: list[list[Sample | None]] = field(default_factory=list)
    sizes: list[tuple[int, int]] = field(default_factory=list)  # (height, width) of each
    faults: list[BadSample] = field(default_factory=list)


class Feed(Protocol):
    """One rank's share of every step."""

    def step(self, step: int) -> StepSamples: ...

    def __enter__(self) -> Self: ...

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None: ...


class ExactFeed:
    """Every sample once an epoch; the result does not depend on the number of threads or ranks."""

    def __init__(
        self,
        catalog: Catalog,
        order: Order,
        share: Sequence[range],  # positions of this rank's slots, per micro-batch
        reader: Reader,
        *,
        workers: int,
        seed: int = 0,
        choice: Choice = "first",
        check: Check = lambda record, sample: None,
        on_slow: Callable[[str], None] = lambda text: None,
        patience: float = PATIENCE,
    ) -> None:
        self.catalog, self.order, self.share, self.reader = catalog, order, share, reader
        self.seed, self.choice, self.check = seed, choice, check
        self.on_slow, self.patience = on_slow, patience
        self.pool = ThreadPoolExecutor(max(1, workers), thread_name_prefix="feed")
        self.ahead = READ_AHEAD if workers else 0
        self.coming: dict[int, list[list[Waiting | None]]] = {}

    def step(self, step: int) -> StepSamples:
        for wanted in range(step, step + self.ahead + 1):
            if wanted not in self.coming:
                self.coming[wanted] = self.request(wanted)
        result = StepSamples(self.order.epoch_of(step))
        for micro_batch in self.coming.pop(step):
            read = [waiting and self.wait(waiting) for waiting in micro_batch]
            result.faults += [item for item in read if isinstance(item, BadSample)]
            result.micro_batches.append(
                [item if isinstance(item, Sample) else None for item in read]
            )
            result.sizes.append(self.order.size(step))
        return result

    def request(self, step: int) -> list[list["Waiting | None"]]:
        slots, epoch = self.order.slots(step), self.order.epoch_of(step)

        def ask(index: int) -> Waiting | None:
            if index == EMPTY:
                return None
            record = self.catalog[index]
            return Waiting(record, self.pool.submit(self.read, record, epoch))

        return [[ask(slots[position]) for position in positions] for positions in self.share]

    def read(self, record: Record, epoch: int) -> Sample | BadSample:
        choose = partial(
            chosen_caption, choice=self.choice, seed=self.seed, epoch=epoch, key=record.key
        )
        return read_sample(self.reader, record, choose, self.check)

    def wait(self, waiting: "Waiting") -> Sample | BadSample:
        """A sample that does not come is named, and in the end given up."""
        since = time.monotonic()
        while (waited := time.monotonic() - since) < self.patience:
            try:
                return waiting.future.result(min(SLOW, self.patience - waited))
            except NotYet:
                self.on_slow(f"{waiting.record.where}: {time.monotonic() - since:.0f} s of waiting")
        return BadSample(waiting.record.where, "took too long to read", f"{self.patience:g} s")

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.pool.shutdown(wait=False, cancel_futures=True)


@dataclass(frozen=True)
class Waiting:
    """A sample that was asked for."""

    record: Record
    future: Future[Sample | BadSample]


def read_sample(
    reader: Reader, record: Record, choose: Callable[[Sequence[str]], int], check: Check
) -> Sample | BadSample:
    try:
        sample = reader.read(record, choose)
        check(record, sample)
    except BadSample as fault:
        return fault
    return sample
