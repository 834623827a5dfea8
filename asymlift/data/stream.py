"""Shards that can only be read from front to back: pipes, object stores, anything with a URL.

What this promises is less than what an index does (`data.mode: stream` says so when it starts):
every rank goes through its share of the shards, pass after pass, in an order that follows from
(seed, first step, pass), shuffled in a bounded buffer. A resumed run begins a new pass, so some
samples of the broken one come again and others wait for the next. Damage is still found and said.
"""

import errno
import subprocess
import threading
import time
from collections import Counter, deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from itertools import count
from queue import Empty, Full, Queue
from typing import Any, BinaryIO, cast
from urllib.parse import urlsplit, urlunsplit

import torch

from asymlift.data.ahead import read_ahead
from asymlift.data.braces import expand_braces
from asymlift.data.buckets import Fit, Refusal, buckets, place, whole_patches
from asymlift.data.captions import Choice
from asymlift.data.feed import GRACE, PATIENCE, SLOW, Check, Feed, StepSamples, read_sample
from asymlift.data.order import generator
from asymlift.data.reader import Reader
from asymlift.data.records import LATENT, BadSample, OnBad, Record, Sample, inline
from asymlift.data.table import (
    KNOWN,
    Gap,
    Habit,
    fault_in_member,
    picture_size,
    split_name,
    two_images,
)
from asymlift.data.tar import CUT_OFF, Damage, Member, StreamBlocks, scan
from asymlift.data.tar import shown as printable
from asymlift.errors import BadData, Unavailable

BUFFER_SAMPLES = 1000  # among which the next one is drawn
BUFFER_BYTES = 1 << 28
MOST_UNTOLD = 100  # bad samples that wait for a step to be told with
STEPS_AHEAD = 2

GUARANTEE = (
    "data.mode: stream reads shards from front to back: samples are not each seen exactly once an "
    "epoch, and a resumed run begins a new pass over the shards"
)


# ---- opening -----------------------------------------------------------------------------------


def expand_urls(patterns: str | Sequence[str]) -> list[str]:
    """`pipe:COMMAND`, `s3://...`, paths; braces stand for ranges."""
    given = [patterns] if isinstance(patterns, str) else patterns
    urls = [url for pattern in given for url in expand_braces(str(pattern))]
    if not urls:
        raise BadData("data.train: names no shards")
    if len(set(urls)) < len(urls):
        raise BadData(f"data.train: {shown(Counter(urls).most_common(1)[0][0])} is listed twice")
    return urls


def shown(url: str) -> str:
    """A URL without what may be secret in it: user, password, query; of a command its program."""
    if url.startswith("pipe:"):
        words = url.removeprefix("pipe:").split()
        return (
            f"pipe:{words[0] if words else ''} ... {words[-1].rpartition('/')[2]}"
            if words[1:]
            else url
        )
    if "://" not in url:
        return url
    parts = urlsplit(url)
    return urlunsplit((parts.scheme, parts.netloc.rpartition("@")[2], parts.path, "", ""))


@contextmanager
def opened(url: str) -> Iterator[BinaryIO]:
    """A shard as a stream of bytes; BadSample where it cannot be had, or its command fails."""
    if url.startswith("pipe:"):
        command = url.removeprefix("pipe:")
        with subprocess.Popen(command, shell=True, stdout=subprocess.PIPE) as process:
            assert process.stdout is not None
            try:
                yield cast(BinaryIO, process.stdout)
            finally:
                process.stdout.close()
                code = process.wait()
        if code:
            raise BadSample(shown(url), "command failed", f"exit {code}")
        return
    if "://" in url:
        import fsspec

        try:
            source = fsspec.open(url, "rb")
        except (ImportError, ValueError) as error:
            scheme = url.partition(":")[0]
            raise Unavailable(
                f"{shown(url)}: no reader for {scheme}:// is installed ({error}); install fsspec's "
                f"package for it (s3fs, gcsfs, ...), or use pipe:COMMAND"
            ) from None
        with ExitStack() as held:
            with foreign_errors():
                remote = held.enter_context(source)
            yield cast(BinaryIO, Remote(remote))
    else:
        with open(url, "rb") as stream:  # noqa: PTH123
            yield stream


class Remote:
    """A file in somebody's store."""

    def __init__(self, file: Any) -> None:
        self.file = file

    def read(self, count: int = -1) -> bytes:
        with foreign_errors():
            data: bytes = self.file.read(count)
            return data


@contextmanager
def foreign_errors() -> Iterator[None]:
    """Whatever the client of a store raises is an OSError: it costs the shard, not the run."""
    try:
        yield
    except OSError:
        raise
    except Exception as error:
        raise OSError(errno.EIO, type(error).__name__) from error


# ---- samples of one shard ----------------------------------------------------------------------


class Streamed:
    """The samples of a stream, one by one, by the same rules as an index keeps."""

    def __init__(self, shard: str, on_bad: OnBad) -> None:
        self.shard, self.on_bad = shard, on_bad
        self.habit = Habit()
        self.seen: set[str] = set()
        self.key: str | None = None
        self.members: list[str] = []  # all suffixes of the sample at hand
        self.parts: dict[str, bytes] = {}  # those that we know
        self.fault: tuple[str, str] | None = None
        self.gaps: list[Gap] = []
        self.damage: Damage | None = None  # since the last member

    def records(self, stream: BinaryIO) -> Iterator[Record]:
        blocks = StreamBlocks(stream)
        for member in scan(blocks, self.note_damage):
            key, _ = split_name(member.name)
            if key != self.key:
                yield from self.finished()
                self.begin(key)
            self.add(member, blocks)
        yield from self.finished()

    def note_damage(self, damage: Damage) -> None:
        self.on_bad(BadSample(self.shard, damage.reason, damage.detail))
        self.gaps.append((len(self.members), damage))
        self.damage = damage

    def begin(self, key: str) -> None:
        self.key, self.members, self.parts = key, [], {}
        self.gaps = [(0, self.damage)] if self.damage else []
        self.fault = ("duplicate key", "") if key and key in self.seen else None
        self.seen.add(key)

    def add(self, member: Member, blocks: StreamBlocks) -> None:
        _, suffix = split_name(member.name)
        others, self.damage = self.members, None
        fault = fault_in_member(member.name, member.size, plain=member.plain, others=others)
        if suffix in KNOWN and fault is None:
            data = blocks.read(member.offset, member.size)
            if len(data) < member.size:
                fault = CUT_OFF, f"{member.size} bytes of {suffix} expected"
            self.parts[suffix] = data
        self.members.append(suffix)
        self.fault = self.fault or fault

    def finished(self) -> Iterator[Record]:
        """The sample at hand, if it can be used."""
        if self.key is None:
            return
        fault = (
            self.fault
            or self.habit.fault_beside_damage(self.members, self.gaps)
            or two_images(self.members)
        )
        if not self.gaps:
            self.habit.note(dict.fromkeys(self.members))
        name = self.key or "".join(self.members[:1])
        where = f"{self.shard}!{printable(name)}"
        if fault is not None:
            self.on_bad(BadSample(where, *fault))
            return
        parts = {suffix: inline(data) for suffix, data in self.parts.items()}
        record = Record(self.key, where, parts, 0, 0)
        if record.image_suffix is not None:
            data = self.parts[record.image_suffix]
            width, height = picture_size(lambda count: data[:count], len(data))
            record = replace(record, width=width, height=height)
        yield record


# ---- one rank's samples ------------------------------------------------------------------------


class Stream:
    """An endless sequence of records for one rank; deterministic for (seed, first step)."""

    def __init__(
        self,
        urls: Sequence[str],
        fit: Fit,
        *,
        rank: int,
        world: int,
        seed: int,
        first_step: int,
        on_bad: OnBad,
        on_note: Callable[[str], None] = lambda text: None,
    ) -> None:
        if len(urls) < world:
            raise BadData(
                f"data.mode: stream needs a shard for every rank: {len(urls)} for {world} ranks"
            )
        self.urls, self.fit, self.on_bad, self.on_note = list(urls), fit, on_bad, on_note
        self.refused: Counter[str] = Counter()  # sound pictures of unusable size, by reason
        self.rank, self.world, self.seed, self.first_step = rank, world, seed, first_step
        self.num_whole, self.usual_samples = 0, 0.0  # shards read to their end; what they hold

    def records(self) -> Iterator[tuple[int, Record]]:
        """(pass, record), shuffled in a buffer."""
        for number in count():
            draw = generator(self.seed, "stream", self.first_step, number)
            order = torch.randperm(len(self.urls), generator=draw).tolist()
            mine = [self.urls[index] for index in order[self.rank :: self.world]]
            empty = True
            for record in self.shuffled(mine, generator(self.seed, "mix", self.rank, number)):
                empty = False
                yield number, record
            if empty:
                raise BadData(f"{shown(mine[0])}: no usable sample in {len(mine)} shards")

    def shuffled(self, urls: Sequence[str], draw: torch.Generator) -> Iterator[Record]:
        buffer, size = list[Record](), 0
        for url in urls:
            for record in self.shard(url):
                buffer.append(record)
                size += weight(record)
                while len(buffer) > BUFFER_SAMPLES or (size > BUFFER_BYTES and len(buffer) > 1):
                    chosen = self.draw_from(buffer, draw)
                    size -= weight(chosen)
                    yield chosen
        while buffer:
            yield self.draw_from(buffer, draw)

    def draw_from(self, buffer: list[Record], draw: torch.Generator) -> Record:
        index = int(torch.randint(len(buffer), (), generator=draw))
        buffer[index], buffer[-1] = buffer[-1], buffer[index]
        return buffer.pop()

    def shard(self, url: str) -> Iterator[Record]:
        """Its samples with the size that the model sees."""
        name, found = shown(url), 0
        broken: list[BadSample] = []  # what is wrong with the shard itself

        def note(fault: BadSample) -> None:
            nonlocal found
            if fault.where == name:
                broken.append(fault)
            else:
                found += 1
                self.on_bad(fault)

        try:
            with opened(url) as stream:
                for record in Streamed(name, note).records(stream):
                    found += 1
                    target = self.target(record)
                    if isinstance(target, Refusal):
                        self.refuse(record, target)
                    else:
                        yield replace(record, target=target)
        except BadSample as fault:
            broken.append(fault)
        except OSError as error:
            said = error.strerror or type(error).__name__  # its text may hold what `shown` hides
            broken.append(BadSample(name, "shard cannot be read", said))
        if broken:
            broken[0].count = max(round(self.usual_samples) - found, 1)
            for one in broken:
                self.on_bad(one)
        else:
            self.num_whole += 1
            self.usual_samples += (found - self.usual_samples) / self.num_whole

    def refuse(self, record: Record, refusal: Refusal) -> None:
        if not self.refused[refusal.reason]:
            said = BadSample(record.where, refusal.reason, refusal.detail)
            self.on_note(f"left out: {said}; others are left out without a word")
        self.refused[refusal.reason] += 1

    def target(self, record: Record) -> tuple[int, int] | Refusal | None:
        if not record.width:
            return None  # reading it will say why
        if LATENT in record.parts:
            return whole_patches(record.width, record.height, self.fit.patch)
        return place(record.width, record.height, self.fit)


def weight(record: Record) -> int:
    return sum(part.size for part in record.parts.values())


# ---- the feed ----------------------------------------------------------------------------------


class StreamFeed(Feed):
    """Micro-batches of one size each, from a stream that a thread reads ahead."""

    def __init__(
        self,
        stream: Callable[[OnBad], Stream],
        reader: Reader,
        *,
        micro_batch: int,
        accumulation: int,
        workers: int,
        seed: int = 0,
        choice: Choice = "first",
        check: Check = lambda record, sample: None,
        on_slow: Callable[[str], None] = lambda text: None,
        patience: float = PATIENCE,
    ) -> None:
        self.reader, self.check, self.seed, self.choice = reader, check, seed, choice
        self.micro_batch, self.accumulation, self.workers = micro_batch, accumulation, workers
        self.on_slow, self.patience = on_slow, patience
        self.faults: deque[BadSample] = deque()
        self.stream = stream(self.faults.append)
        self.ready: Queue[StepSamples | BaseException] = Queue(STEPS_AHEAD)
        self.closed = threading.Event()
        self.thread = threading.Thread(target=self.produce, name="stream", daemon=True)
        self.thread.start()

    def produce(self) -> None:
        try:
            for step in self.steps():
                if not self.offer(step):
                    return
        except BaseException as error:  # raised where the steps are taken
            self.offer(error)

    def offer(self, item: StepSamples | BaseException) -> bool:
        while not self.closed.is_set():
            try:
                self.ready.put(item, timeout=0.1)
                return True
            except Full:
                continue
        return False

    def steps(self) -> Iterator[StepSamples]:
        step = StepSamples(0)
        for epoch, size, samples in self.micro_batches():
            step.micro_batches.append(samples)
            step.sizes.append(size)
            step.epoch = epoch
            if len(step.micro_batches) == self.accumulation:
                while self.faults:
                    step.faults.append(self.faults.popleft())
                yield step
                step = StepSamples(epoch)

    def micro_batches(self) -> Iterator[tuple[int, tuple[int, int], list[Sample | None]]]:
        """As soon as there are enough samples of one size."""
        waiting: dict[tuple[int, int], list[Sample | None]] = {}
        some_size = min(size for sizes in buckets(self.stream.fit).values() for size in sizes)
        for epoch, read in read_ahead(self.read, self.stream.records(), self.workers):
            if isinstance(read, BadSample):
                self.faults.append(read)
                if len(self.faults) > max(MOST_UNTOLD, self.micro_batch * self.accumulation):
                    yield epoch, some_size, [None] * self.micro_batch  # a step to tell them with
                continue
            height, width = read.image.shape[-2:]
            some = waiting.setdefault((height, width), [])
            some.append(read)
            if len(some) == self.micro_batch:
                del waiting[height, width]
                yield epoch, (height, width), some

    def read(self, item: tuple[int, Record]) -> tuple[int, Sample | BadSample]:
        epoch, record = item
        sample = read_sample(self.reader, record, self.check, self.choice, self.seed, epoch)
        return epoch, sample

    def step(self, step: int) -> StepSamples:
        """The next samples, whatever the step."""
        since = time.monotonic()
        while (waited := time.monotonic() - since) < self.patience:
            try:
                item = self.ready.get(timeout=min(SLOW, self.patience - waited))
            except Empty:
                self.on_slow(f"the stream: {time.monotonic() - since:.0f} s of waiting")
                continue
            if isinstance(item, BaseException):
                raise item
            return item
        raise BadData(f"data.train: the stream brought nothing for {self.patience:g} s")

    def close(self) -> None:
        self.closed.set()
        self.thread.join(GRACE)  # what is inside a decoder when the interpreter ends may abort it
