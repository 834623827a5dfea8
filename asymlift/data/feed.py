"""Samples in training order, read ahead by threads; what is broken becomes an empty slot."""

from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from types import TracebackType
from typing import Self

from asymlift.data.order import EMPTY, Order
from asymlift.data.shards import BadSample, Sample, SampleIndex, ShardReader

READ_AHEAD = 2  # steps


@dataclass
class StepSamples:
    """What one rank trains on in one step: per micro-batch, a sample or None per slot."""

    micro_batches: list[list[Sample | None]]
    faults: list[BadSample] = field(default_factory=list)


class Feed:
    """Reads a rank's share of every step; the result does not depend on the number of threads."""

    def __init__(
        self,
        samples: Sequence[SampleIndex],
        order: Order,
        share: Sequence[range],  # positions of this rank's slots, per micro-batch
        *,
        workers: int,
        check: Callable[[SampleIndex, Sample], None] = lambda index, sample: None,
    ) -> None:
        self.samples, self.order, self.share = samples, order, share
        self.check = check  # raises BadSample where a sample does not fit the model
        self.reader = ShardReader()
        self.pool = ThreadPoolExecutor(max(1, workers), thread_name_prefix="feed")
        self.ahead = READ_AHEAD if workers else 0
        self.coming: dict[int, list[list[Future[Sample | BadSample] | None]]] = {}

    def step(self, step: int) -> StepSamples:
        for wanted in range(step, step + self.ahead + 1):
            if wanted not in self.coming:
                self.coming[wanted] = self.request(wanted)
        result = StepSamples([])
        for futures in self.coming.pop(step):
            read = [future.result() if future else None for future in futures]
            result.faults += [item for item in read if isinstance(item, BadSample)]
            result.micro_batches.append(
                [item if isinstance(item, Sample) else None for item in read]
            )
        return result

    def request(self, step: int) -> list[list[Future[Sample | BadSample] | None]]:
        slots = self.order.slots(step)
        chosen = [[slots[position] for position in positions] for positions in self.share]
        return [
            [None if i == EMPTY else self.pool.submit(self.read, self.samples[i]) for i in indices]
            for indices in chosen
        ]

    def read(self, index: SampleIndex) -> Sample | BadSample:
        try:
            sample = self.reader.read(index)
            self.check(index, sample)
        except BadSample as fault:
            return fault
        except OSError as error:
            return BadSample(index.where, "cannot be read", str(error))
        return sample

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.pool.shutdown(wait=False, cancel_futures=True)
