"""Samples in training order, read ahead by threads; what is broken becomes an empty slot."""

import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, wait
from concurrent.futures import TimeoutError as NotYet
from dataclasses import dataclass, field
from functools import partial
from queue import SimpleQueue
from threading import Thread
from types import TracebackType
from typing import Self

from asymlift.data.captions import Choice, chosen_caption
from asymlift.data.catalog import Catalog
from asymlift.data.order import EMPTY, Order
from asymlift.data.reader import Reader
from asymlift.data.records import BadSample, Record, Sample

READ_AHEAD = 2  # steps
SLOW = 60.0  # seconds without a sample after which it is named
PATIENCE = 300.0  # seconds of reading after which it is given up
GRACE = 1.0  # seconds that every sample is waited for, and every thread at the end

Check = Callable[[Record, Sample], None]  # raises BadSample where a sample does not fit the model


@dataclass
class StepSamples:
    """What one rank trains on in one step: per micro-batch, a sample or None per slot."""

    epoch: int
    micro_batches: list[list[Sample | None]] = field(default_factory=list)
    sizes: list[tuple[int, int]] = field(default_factory=list)  # (height, width) of each
    faults: list[BadSample] = field(default_factory=list)


class Feed(ABC):
    """One rank's share of every step."""

    @abstractmethod
    def step(self, step: int) -> StepSamples: ...

    @abstractmethod
    def close(self) -> None:
        """End the threads; what hangs ends with the process."""

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()


class ExactFeed(Feed):
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
        slow: float = SLOW,
        patience: float = PATIENCE,
    ) -> None:
        self.catalog, self.order, self.share, self.reader = catalog, order, share, reader
        self.seed, self.choice, self.check = seed, choice, check
        self.on_slow, self.slow, self.patience = on_slow, slow, patience
        self.gave_up = False  # on a sample of this step
        self.threads = Threads(max(1, workers))
        self.ahead = READ_AHEAD if workers else 0
        self.coming: dict[int, list[list[Reading | None]]] = {}

    def step(self, step: int) -> StepSamples:
        if next(iter(self.coming), step) != step:
            self.forget()
        for wanted in range(step, step + self.ahead + 1):
            if wanted not in self.coming:
                self.coming[wanted] = self.request(wanted)
        result = StepSamples(self.order.epoch_of(step))
        self.gave_up = False
        for micro_batch in self.coming.pop(step):
            # One awakening for all: threads that work are slowed by those that are woken.
            last = [reading.future for reading in micro_batch if reading][-1:]
            wait(last, min(self.slow, self.patience_left))
            read = [reading and self.wait(reading) for reading in micro_batch]
            result.faults += [item for item in read if isinstance(item, BadSample)]
            result.micro_batches.append(
                [item if isinstance(item, Sample) else None for item in read]
            )
            result.sizes.append(self.order.size(step))
        return result

    def request(self, step: int) -> list[list["Reading | None"]]:
        slots, epoch = self.order.slots(step), self.order.epoch_of(step)

        def ask(index: int) -> Reading | None:
            if index == EMPTY:
                return None
            record = self.catalog[index]
            reading = Reading(record.where, partial(self.read, record, epoch))
            self.threads.add(reading)
            return reading

        return [[ask(slots[position]) for position in positions] for positions in self.share]

    def read(self, record: Record, epoch: int) -> Sample | BadSample:
        return read_sample(self.reader, record, self.check, self.choice, self.seed, epoch)

    @property
    def patience_left(self) -> float:
        """After one that hung, the rest of its step had as long: else a dead disk costs hours."""
        return min(GRACE, self.patience) if self.gave_up else self.patience

    def wait(self, reading: "Reading") -> Sample | BadSample:
        """A sample that does not come is named, and in the end given up."""
        asked = time.monotonic()
        while True:
            left = max(self.patience_left - reading.seconds, min(GRACE, self.patience))
            try:
                return reading.future.result(min(self.slow, left))
            except NotYet:
                if reading.future.done():  # just now, or it is the reader's own exception
                    return reading.future.result()
                waited = max(reading.seconds, time.monotonic() - asked if self.gave_up else 0.0)
                if waited >= self.patience_left:
                    self.gave_up = True
                    self.threads.abandon(reading)
                    return BadSample(reading.where, "took too long to read", f"{self.patience:g} s")
                self.on_slow(f"{reading.where}: {time.monotonic() - asked:.0f} s of waiting")

    def forget(self) -> None:
        """Drop what was read ahead."""
        for reading in self.read_ahead():
            self.threads.abandon(reading)
        self.coming.clear()

    def read_ahead(self) -> Iterator["Reading"]:
        for micro_batch in (some for step in self.coming.values() for some in step):
            yield from filter(None, micro_batch)

    def close(self) -> None:
        for reading in self.read_ahead():
            reading.future.cancel()
        self.coming.clear()
        self.threads.close()


# ---- threads -----------------------------------------------------------------------------------


class Reading:
    """A sample that was asked for."""

    def __init__(self, where: str, read: Callable[[], Sample | BadSample]) -> None:
        self.where, self.read = where, read
        self.future: Future[Sample | BadSample] = Future()
        self.since: float | None = None  # when a thread began with it
        self.abandoned = False

    @property
    def seconds(self) -> float:
        """How long it has been read."""
        return 0.0 if self.since is None else time.monotonic() - self.since

    def run(self) -> None:
        self.since = time.monotonic()
        try:
            self.future.set_result(self.read())
        except BaseException as error:  # raised again where the sample is waited for
            self.future.set_exception(error)


class Threads:
    """Readers that hinder nobody when they hang: another takes over, and the process may end.

    The threads of a ThreadPoolExecutor are joined when the interpreter exits.
    """

    def __init__(self, count: int) -> None:
        self.waiting: SimpleQueue[Reading | None] = SimpleQueue()
        self.running: list[Thread] = []
        for _ in range(count):
            self.start()

    def start(self) -> None:
        self.running = [thread for thread in self.running if thread.is_alive()]
        thread = Thread(target=self.work, name=f"feed_{len(self.running)}", daemon=True)
        self.running.append(thread)
        thread.start()

    def work(self) -> None:
        while (reading := self.waiting.get()) is not None:
            if reading.future.set_running_or_notify_cancel():
                reading.run()
            if reading.abandoned:
                return

    def add(self, reading: Reading) -> None:
        self.waiting.put(reading)

    def abandon(self, reading: Reading) -> None:
        """Nobody waits for it any more. Where a thread is busy with it, a new one takes over."""
        if not reading.future.cancel() and not reading.future.done():
            reading.abandoned = True
            self.start()

    def close(self) -> None:
        """End the threads; what hangs ends with the process."""
        for _ in self.running:
            self.waiting.put(None)
        end = time.monotonic() + GRACE
        for thread in self.running:
            thread.join(max(end - time.monotonic(), 0))


def read_sample(
    reader: Reader, record: Record, check: Check, choice: Choice, seed: int, epoch: int
) -> Sample | BadSample:
    """A sample as an epoch trains on it, or why it cannot."""
    choose = partial(chosen_caption, choice=choice, seed=seed, epoch=epoch, key=record.key)
    try:
        sample = reader.read(record, choose)
        check(record, sample)
    except BadSample as fault:
        return fault
    return sample
