"""Samples come in the same order however many threads read them; what is broken leaves a hole."""

import subprocess
import sys
import threading
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from asymlift.data.buckets import Fit
from asymlift.data.catalog import Catalog
from asymlift.data.feed import READ_AHEAD, ExactFeed, StepSamples
from asymlift.data.order import EMPTY, Order, share_of
from asymlift.data.reader import Reader
from asymlift.data.records import LATENT, TEXT, BadSample, Record, Sample
from asymlift.data.writer import write_shard

COUNT, BATCH = 11, 4
FIT = Fit(sides=(8,), patch=8)


def make_sample(number: int) -> Sample:
    g = torch.Generator().manual_seed(number)
    image = torch.randint(0, 256, (3, 8, 8), dtype=torch.uint8, generator=g)
    return Sample(
        f"{number:06d}", image, f"caption {number}", {}, torch.randn(4, 2, 2, generator=g)
    )


@pytest.fixture
def catalog(tmp_path: Path) -> Catalog:
    shard = tmp_path / "000000.tar"
    return Catalog([write_shard(shard, (make_sample(i) for i in range(COUNT)))], FIT)


@pytest.fixture
def order(catalog: Catalog) -> Order:
    return Order(catalog.targets, BATCH, seed=3)


def whole_batch(order: Order) -> list[range]:
    return share_of(range(BATCH), 0, 1, 2)


def feed_of(catalog, order, *, share=None, reader=None, workers=2, **options) -> ExactFeed:
    share = whole_batch(order) if share is None else share
    return ExactFeed(catalog, order, share, reader or Reader(), workers=workers, **options)


def keys(step: StepSamples) -> list[list[str | None]]:
    return [[sample and sample.key for sample in micro] for micro in step.micro_batches]


def expected(order: Order, step: int) -> list[list[str | None]]:
    slots = [None if i == EMPTY else f"{i:06d}" for i in order.slots(step)]
    return [slots[:2], slots[2:]]


@pytest.mark.parametrize("workers", [0, 1, 3])
def test_every_number_of_threads_gives_the_planned_samples(catalog, order, workers):
    """Over two epochs, with an epoch's empty slots, to the last pixel."""
    with feed_of(catalog, order, workers=workers) as feed:
        for number in range(2 * order.steps_per_epoch):
            step = feed.step(number)
            assert keys(step) == expected(order, number)
            assert step.faults == []
            for sample in (s for micro in step.micro_batches for s in micro if s is not None):
                made = make_sample(int(sample.key))
                assert torch.equal(sample.image, made.image)
                assert torch.equal(sample.latent, made.latent)
                assert sample.caption == made.caption
    assert any(EMPTY in order.slots(number) for number in range(order.steps_per_epoch))


@pytest.mark.parametrize("workers", [0, 1, 3])
def test_steps_can_be_asked_for_in_any_order(catalog, order, workers):
    """A resumed run begins anywhere."""
    with feed_of(catalog, order, workers=workers) as feed:
        for number in (5, 0, 7, 1, 2, 0, 5):
            assert keys(feed.step(number)) == expected(order, number)


def test_ranks_read_their_own_positions(catalog, order):
    steps = []
    for rank in range(2):
        with feed_of(catalog, order, share=share_of(range(BATCH), rank, 2, 1), workers=1) as feed:
            steps.append(keys(feed.step(1)))
    flat = expected(order, 1)[0] + expected(order, 1)[1]
    assert steps == [[[flat[0]], [flat[2]]], [[flat[1]], [flat[3]]]]


def test_workers_read_ahead_and_without_workers_nothing_does(catalog, order):
    for workers, ahead in ((0, 0), (2, READ_AHEAD)):
        with feed_of(catalog, order, workers=workers) as feed:
            feed.step(0)
            assert sorted(feed.coming) == list(range(1, 1 + ahead))


def test_only_as_many_threads_read_as_asked_for(catalog, order):
    names = set()

    def check(record: Record, sample: Sample) -> None:
        names.add(threading.current_thread().name)

    with feed_of(catalog, order, workers=3, check=check) as feed:
        for number in range(6):
            feed.step(number)
    assert names <= {"feed_0", "feed_1", "feed_2"} and names


def overwrite(record: Record, suffix: str = ".png") -> None:
    """One part of a sample overwritten with zeros."""
    part = record.parts[suffix]
    with part.path.open("r+b") as file:
        file.seek(part.offset)
        file.write(bytes(part.size))


def all_faults(feed: ExactFeed, order: Order) -> list[BadSample]:
    with feed:
        return [f for number in range(order.steps_per_epoch) for f in feed.step(number).faults]


@pytest.mark.parametrize("workers", [0, 3])
def test_a_damaged_sample_leaves_a_hole_and_is_reported_once(catalog, order, workers):
    bad = 5
    overwrite(catalog[bad])
    faults: list[BadSample] = []
    with feed_of(catalog, order, workers=workers) as feed:
        for number in range(order.steps_per_epoch):
            step = feed.step(number)
            planned = expected(order, number)
            holed = [[None if key == f"{bad:06d}" else key for key in micro] for micro in planned]
            assert keys(step) == holed
            assert len(step.faults) == sum(a != b for a, b in zip(planned, holed, strict=True))
            faults += step.faults
    (fault,) = faults
    assert fault.where == catalog[bad].where and fault.where.endswith(f"!{bad:06d}")
    assert fault.reason == "changed since it was indexed"


def test_a_shard_that_has_gone_is_reported_sample_by_sample(catalog, order):
    catalog[0].parts[".png"].path.unlink()
    faults = all_faults(feed_of(catalog, order), order)
    assert sorted(f.where for f in faults) == [record.where for record in catalog]
    assert {fault.reason for fault in faults} == {"file is missing"}


def test_a_cut_shard_is_a_fault_and_not_a_short_picture(catalog, order):
    part = catalog[COUNT - 1].parts[".png"]
    part.path.write_bytes(part.path.read_bytes()[: part.offset + part.size - 1])
    (fault,) = {f.where: f for f in all_faults(feed_of(catalog, order), order)}.values()
    assert fault.where == catalog[COUNT - 1].where and fault.reason == "shard is cut off"


def test_what_does_not_fit_the_model_is_left_out_by_the_check(catalog, order):
    def check(record: Record, sample: Sample) -> None:
        assert record.key == sample.key
        if sample.key == "000007":
            raise BadSample(record.where, "too blue")

    seen, faults = [], []
    with feed_of(catalog, order, workers=2, check=check) as feed:
        for number in range(order.steps_per_epoch):
            step = feed.step(number)
            seen += [key for micro in keys(step) for key in micro if key]
            faults += step.faults
    assert sorted(seen) == [f"{i:06d}" for i in range(COUNT) if i != 7]
    assert [str(fault) for fault in faults] == [f"{catalog[7].where}: too blue"]


def test_our_own_mistakes_are_no_bad_samples(catalog, order):
    def check(record: Record, sample: Sample) -> None:
        raise KeyError("a bug")

    with feed_of(catalog, order, workers=2, check=check) as feed:  # noqa: SIM117
        with pytest.raises(KeyError, match="a bug"):
            feed.step(0)


def test_empty_slots_read_nothing(tmp_path):
    few = Catalog([write_shard(tmp_path / "a.tar", map(make_sample, range(2)))], FIT)
    order = Order(few.targets, BATCH, seed=0)  # two samples, four slots
    asked = []

    def check(record: Record, sample: Sample) -> None:
        asked.append(record.key)

    with feed_of(few, order, workers=0, check=check) as feed:
        step = feed.step(0)
    flat = [key for micro in keys(step) for key in micro]
    assert sorted(key for key in flat if key) == sorted(asked) == ["000000", "000001"]
    assert flat[2:] == [None, None] and step.faults == []


def test_a_step_says_its_epoch_and_the_size_of_each_micro_batch(tmp_path):
    """Pictures are brought to their record's size while they are read."""
    sizes = [(24, 24), (32, 16), (16, 32)]
    samples = [
        Sample(f"{i:02d}", torch.zeros(3, h + 3, w + 5, dtype=torch.uint8))
        for i, (h, w) in enumerate(sizes * 5)
    ]
    fit = Fit(sides=(24,), patch=8, step=8)
    mixed = Catalog([write_shard(tmp_path / "a.tar", samples)], fit)
    order = Order(mixed.targets, BATCH, seed=1)
    met = set()
    with feed_of(mixed, order) as feed:
        for number in range(2 * order.steps_per_epoch):
            step = feed.step(number)
            assert step.epoch == number // order.steps_per_epoch
            assert step.sizes == [order.size(number)] * 2
            for size, micro in zip(step.sizes, step.micro_batches, strict=True):
                assert {tuple(s.image.shape[-2:]) for s in micro if s is not None} <= {size}
            met |= set(step.sizes)
    assert met == {tuple(size) for size in mixed.targets.tolist()} and len(met) == 3


def test_leaving_ends_the_threads(catalog, order):
    with feed_of(catalog, order, workers=3) as feed:
        feed.step(0)
        threads = feed.threads.running
    assert len(threads) == 3
    assert not any(thread.is_alive() for thread in threads)


def test_nothing_stays_of_what_was_read(catalog, order):
    """Only the steps that are read ahead, however far one jumps."""
    with feed_of(catalog, order) as feed:
        for number in [*range(30), 4, 100, 101, 3]:
            feed.step(number)
            assert list(feed.coming) == [number + 1, number + 2]
        assert len(feed.threads.running) <= 2 + READ_AHEAD * BATCH


# ---- captions, and what is cached --------------------------------------------------------------


def test_the_caption_is_drawn_anew_in_every_epoch_and_the_same_on_every_rank(tmp_path):
    samples = [
        Sample(f"{i:02d}", make_sample(i).image, facts={"captions": [f"{i} a", f"{i} b", f"{i} c"]})
        for i in range(BATCH * 5)
    ]
    several = Catalog([write_shard(tmp_path / "a.tar", samples)], FIT)
    order = Order(several.targets, BATCH, seed=0)

    def drawn(epoch: int, world: int, seed: int = 0) -> dict[str, str]:
        found = {}
        for rank in range(world):
            share = share_of(range(BATCH), rank, world, 1)
            feed = feed_of(several, order, share=share, workers=rank, seed=seed, choice="random")
            with feed:
                for number in range(order.steps_per_epoch):
                    step = feed.step(epoch * order.steps_per_epoch + number)
                    found |= {s.key: s.caption for micro in step.micro_batches for s in micro if s}
        return found

    assert drawn(0, 1) == drawn(0, 2) == drawn(0, 4)
    assert drawn(0, 1) != drawn(1, 1) and drawn(0, 1) != drawn(0, 1, seed=1)
    assert {text[-1] for text in drawn(0, 1).values()} == set("abc")


def test_what_is_cached_is_read_only_where_it_is_wanted(tmp_path):
    samples = [replace(make_sample(i), text={"words": torch.ones(2, 3)}) for i in range(BATCH)]
    shard = Catalog([write_shard(tmp_path / "a.tar", samples)], FIT)
    order = Order(shard.targets, BATCH, seed=0)
    for record in shard:
        overwrite(record, TEXT)  # whoever reads it, stumbles
    for cached, bad in (((LATENT, TEXT), BATCH), ((LATENT,), 0), ((), 0)):
        with feed_of(shard, order, reader=Reader(cached=cached)) as feed:
            step = feed.step(0)
        read = [sample for micro in step.micro_batches for sample in micro if sample]
        assert len(step.faults) == bad and len(read) == BATCH - bad
        assert all((sample.latent is not None) == (LATENT in cached) for sample in read)


# ---- readers that hang -------------------------------------------------------------------------


class Stuck(Reader):
    """Hangs for ever on some keys, like a network disk that has gone."""

    def __init__(self, *hang_on: str) -> None:
        super().__init__()
        self.hang_on, self.let_go = hang_on, threading.Event()

    def image(self, record: Record):
        if record.key in self.hang_on:
            self.let_go.wait()
        return super().image(record)


@pytest.mark.parametrize("workers", [0, 1, 3])
def test_a_reader_that_hangs_costs_its_sample_alone(catalog, order, workers):
    """More of them hang than there are threads; every one is named while it is waited for."""
    hang_on = [f"{number:06d}" for number in (1, 4, 5, 8)]
    slow: list[str] = []
    reader = Stuck(*hang_on)
    feed = feed_of(
        catalog,
        order,
        reader=reader,
        workers=workers,
        slow=0.05,
        patience=0.2,
        on_slow=slow.append,
    )
    seen, faults = [], []
    with feed:
        for number in range(order.steps_per_epoch):
            step = feed.step(number)
            planned = [key for micro in expected(order, number) for key in micro]
            found = [key for micro in keys(step) for key in micro]
            assert found == [None if key in hang_on else key for key in planned]
            seen += filter(None, found)
            faults += step.faults
    assert len(seen) == COUNT - 4
    assert sorted(fault.where[-6:] for fault in faults) == hang_on
    assert {(f.reason, f.detail) for f in faults} == {("took too long to read", "0.2 s")}
    assert all(text.endswith(": 0 s of waiting") for text in slow) and slow
    reader.let_go.set()
    for thread in feed.threads.running:
        thread.join(timeout=10)
        assert not thread.is_alive()  # nobody needs those that were replaced


def test_a_disk_that_has_gone_costs_the_patience_once_a_step(catalog, monkeypatch):
    """Not once for every sample that a thread can hang on: the other ranks are waiting."""
    monkeypatch.setattr("asymlift.data.feed.GRACE", 0.02)
    reader = Stuck(*(f"{number:06d}" for number in range(COUNT)))
    order = Order(catalog.targets, COUNT, seed=3)
    share = share_of(range(COUNT), 0, 1, 1)
    started = time.monotonic()
    with feed_of(catalog, order, share=share, reader=reader, workers=1, patience=0.5) as feed:
        assert len(feed.step(0).faults) == COUNT
        assert 0.5 < time.monotonic() - started < 0.5 * COUNT / 2
        reader.let_go.set()
        assert not feed.step(1).faults  # it is back


def test_a_slow_reader_is_waited_for(catalog, order):
    class Slow(Reader):
        def image(self, record: Record):
            time.sleep(0.1)
            return super().image(record)

    told: list[str] = []
    with feed_of(
        catalog, order, reader=Slow(), workers=1, slow=0.03, patience=20, on_slow=told.append
    ) as feed:
        assert keys(feed.step(0)) == expected(order, 0)
    assert told


def test_a_time_out_of_the_readers_own_is_raised(catalog, order):
    class Impatient(Reader):
        def image(self, record: Record):
            raise TimeoutError("of its own")

    with feed_of(catalog, order, reader=Impatient()) as feed, pytest.raises(TimeoutError):
        feed.step(0)


HANGS = """
import sys, time
from pathlib import Path
from asymlift.data.buckets import Fit
from asymlift.data.catalog import Catalog, indexed
from asymlift.data.feed import ExactFeed
from asymlift.data.order import Order
from asymlift.data.reader import Reader

class Hangs(Reader):
    def image(self, record):
        time.sleep(1000)

catalog = Catalog([indexed(Path(sys.argv[1]))], Fit(sides=(8,), patch=8))
order = Order(catalog.targets, 2, seed=0)
with ExactFeed(catalog, order, [range(2)], Hangs(), workers=2, patience=0.1) as feed:
    print({fault.reason for fault in feed.step(0).faults})
"""


def test_a_reader_that_hangs_does_not_keep_the_process(catalog):
    shard = catalog[0].parts[".png"].path
    done = subprocess.run(
        [sys.executable, "-c", HANGS, str(shard)], capture_output=True, text=True, timeout=60
    )
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout == "{'took too long to read'}\n"
