"""Samples come in the same order however many threads read them; what is broken leaves a hole."""

import threading
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from asymlift.data.feed import READ_AHEAD, Feed, StepSamples
from asymlift.data.order import EMPTY, Order, share_of
from asymlift.data.shards import BadSample, Sample, SampleIndex, index_shard, write_shard

COUNT, BATCH = 11, 4


def make_sample(number: int) -> Sample:
    g = torch.Generator().manual_seed(number)
    image = torch.randint(0, 256, (3, 8, 8), dtype=torch.uint8, generator=g)
    return Sample(
        f"{number:06d}", image, f"caption {number}", {}, torch.randn(4, 2, 2, generator=g)
    )


@pytest.fixture
def samples(tmp_path: Path) -> list[SampleIndex]:
    write_shard(tmp_path / "000000.tar", (make_sample(i) for i in range(COUNT)))
    return index_shard(tmp_path / "000000.tar").samples


@pytest.fixture
def order() -> Order:
    return Order([(1, 1)] * COUNT, BATCH, seed=3)


def whole_batch(order: Order) -> list[range]:
    return share_of(range(BATCH), 0, 1, 2)


def keys(step: StepSamples) -> list[list[str | None]]:
    return [[sample and sample.key for sample in micro] for micro in step.micro_batches]


def expected(order: Order, step: int) -> list[list[str | None]]:
    slots = [None if i == EMPTY else f"{i:06d}" for i in order.slots(step)]
    return [slots[:2], slots[2:]]


@pytest.mark.parametrize("workers", [0, 1, 3])
def test_every_number_of_threads_gives_the_planned_samples(samples, order, workers):
    """Over two epochs, with an epoch's empty slots, to the last pixel."""
    with Feed(samples, order, whole_batch(order), workers=workers) as feed:
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
def test_steps_can_be_asked_for_in_any_order(samples, order, workers):
    """A resumed run begins anywhere."""
    with Feed(samples, order, whole_batch(order), workers=workers) as feed:
        for number in (5, 0, 7, 1, 2, 0, 5):
            assert keys(feed.step(number)) == expected(order, number)


def test_ranks_read_their_own_positions(samples, order):
    steps = []
    for rank in range(2):
        with Feed(samples, order, share_of(range(BATCH), rank, 2, 1), workers=1) as feed:
            steps.append(keys(feed.step(1)))
    flat = expected(order, 1)[0] + expected(order, 1)[1]
    assert steps == [[[flat[0]], [flat[2]]], [[flat[1]], [flat[3]]]]


def test_workers_read_ahead_and_without_workers_nothing_does(samples, order):
    for workers, ahead in ((0, 0), (2, READ_AHEAD)):
        with Feed(samples, order, whole_batch(order), workers=workers) as feed:
            feed.step(0)
            assert sorted(feed.coming) == list(range(1, 1 + ahead))


def test_only_as_many_threads_read_as_asked_for(samples, order):
    names = set()

    def check(index: SampleIndex, sample: Sample) -> None:
        names.add(threading.current_thread().name)

    with Feed(samples, order, whole_batch(order), workers=3, check=check) as feed:
        for number in range(6):
            feed.step(number)
    assert names <= {"feed_0", "feed_1", "feed_2"} and names


def broken(samples: list[SampleIndex], number: int) -> list[SampleIndex]:
    """The image of one sample overwritten with zeros."""
    offset, size = samples[number].members[".png"]
    with samples[number].shard.open("r+b") as file:
        file.seek(offset)
        file.write(bytes(size))
    return samples


@pytest.mark.parametrize("workers", [0, 3])
def test_a_damaged_sample_leaves_a_hole_and_is_reported_once(samples, order, workers):
    bad = 5
    faults: list[BadSample] = []
    with Feed(broken(samples, bad), order, whole_batch(order), workers=workers) as feed:
        for number in range(order.steps_per_epoch):
            step = feed.step(number)
            planned = expected(order, number)
            holed = [[None if key == f"{bad:06d}" else key for key in micro] for micro in planned]
            assert keys(step) == holed
            assert len(step.faults) == sum(a != b for a, b in zip(planned, holed, strict=True))
            faults += step.faults
    (fault,) = faults
    assert fault.where == samples[bad].where and fault.where.endswith(f"!{bad:06d}")
    assert fault.reason == "not a JPEG, PNG or WebP image"


def test_a_shard_that_has_gone_is_reported_sample_by_sample(samples, order):
    samples[4] = replace(samples[4], shard=samples[4].shard.with_name("gone.tar"))
    faults = []
    with Feed(samples, order, whole_batch(order), workers=1) as feed:
        for number in range(order.steps_per_epoch):
            faults += feed.step(number).faults
    (fault,) = faults
    assert fault.reason == "cannot be read" and fault.where.endswith("gone.tar!000004")
    assert str(fault).startswith(f"{fault.where}: cannot be read ([Errno 2] No such file")


def test_a_cut_shard_is_a_fault_and_not_a_short_picture(samples, order):
    path = samples[0].shard
    offset, size = samples[-1].members[".png"]
    path.write_bytes(path.read_bytes()[: offset + size - 1])
    with Feed(samples, order, whole_batch(order), workers=2) as feed:
        faults = [f for n in range(order.steps_per_epoch) for f in feed.step(n).faults]
    assert [f.reason for f in faults] == ["shard changed since it was indexed"]


def test_what_does_not_fit_the_model_is_left_out_by_the_check(samples, order):
    def check(index: SampleIndex, sample: Sample) -> None:
        assert index.key == sample.key
        if sample.key == "000007":
            raise BadSample(index.where, "too blue")

    seen, faults = [], []
    with Feed(samples, order, whole_batch(order), workers=2, check=check) as feed:
        for number in range(order.steps_per_epoch):
            step = feed.step(number)
            seen += [key for micro in keys(step) for key in micro if key]
            faults += step.faults
    assert sorted(seen) == [f"{i:06d}" for i in range(COUNT) if i != 7]
    assert [str(fault) for fault in faults] == [f"{samples[7].where}: too blue"]


def test_our_own_mistakes_are_no_bad_samples(samples, order):
    def check(index: SampleIndex, sample: Sample) -> None:
        raise KeyError("a bug")

    with Feed(samples, order, whole_batch(order), workers=2, check=check) as feed:  # noqa: SIM117
        with pytest.raises(KeyError, match="a bug"):
            feed.step(0)


def test_empty_slots_read_nothing(samples):
    order = Order([(1, 1)] * 2, BATCH, seed=0)  # two samples, four slots
    asked = []

    def check(index: SampleIndex, sample: Sample) -> None:
        asked.append(index.key)

    with Feed(samples, order, whole_batch(order), workers=0, check=check) as feed:
        step = feed.step(0)
    flat = [key for micro in keys(step) for key in micro]
    assert sorted(key for key in flat if key) == sorted(asked) == ["000000", "000001"]
    assert flat[2:] == [None, None] and step.faults == []


def test_leaving_ends_the_threads(samples, order):
    with Feed(samples, order, whole_batch(order), workers=3) as feed:
        feed.step(0)
    for thread in list(feed.pool._threads):
        thread.join(timeout=10)
        assert not thread.is_alive()
