"""R7: the order of training, on random datasets: sizes, shards, ranks, threads, cuts, bad samples.

Every sample once per epoch; one global sequence for any number of ranks and threads; a run that
goes on at any step continues it; seeds and epochs differ.
"""

import random
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch

from asymlift.data.buckets import Fit
from asymlift.data.catalog import Catalog, open_catalog
from asymlift.data.feed import ExactFeed
from asymlift.data.order import EMPTY, Order, share_of
from asymlift.data.reader import Reader
from asymlift.data.records import Record, Sample
from asymlift.data.writer import write_shard

PATCH = 4
CASES = 30
WORLDS = (1, 2, 4)
WORKERS = (0, 1, 3)

Slot = tuple[str, str] | None  # (key, caption) of the sample that a slot trains on


@dataclass(frozen=True)
class Case:
    """A random dataset, and how it is trained on."""

    catalog: Catalog
    bad: set[str]  # keys that are damaged on disk and fail when they are read
    micro_batch: int
    batch: int
    seed: int

    def order(self, seed: int | None = None) -> Order:
        return Order(self.catalog.targets, self.batch, self.seed if seed is None else seed)


def make_case(folder: Path, number: int) -> Case:
    draw = random.Random(number)
    fit = Fit(
        sides=tuple(draw.sample([12, 16, 24], draw.randint(1, 3))),
        patch=PATCH,
        step=PATCH,
        max_aspect=3.0,
        upscale=True,
    )
    sizes = [(draw.randint(6, 30), draw.randint(6, 30)) for _ in range(draw.randint(1, 5))]
    num_shards, count = draw.randint(1, 5), 0
    for shard in range(num_shards):
        samples = []
        for _ in range(draw.randint(1, 12)):
            height, width = draw.choice(sizes)
            image = torch.full((3, height, width), draw.randrange(256), dtype=torch.uint8)
            captions = {"captions": [f"{count} by {who}" for who in "abc"]}
            samples.append(Sample(f"{count:04d}", image, facts=captions))
            count += 1
        write_shard(folder / f"{shard}.tar", samples)
    catalog = open_catalog(str(folder / "*.tar"), fit)
    bad = draw.sample(list(catalog), min(draw.randint(0, 3), len(catalog)))
    for record in bad:
        damage(record)
    micro_batch = draw.randint(1, 3)
    batch = micro_batch * max(WORLDS) * draw.randint(1, 2)
    return Case(catalog, {record.key for record in bad}, micro_batch, batch, draw.randrange(1000))


def damage(record: Record) -> None:
    part = record.parts[".png"]
    assert part.path is not None
    with part.path.open("r+b") as file:
        file.seek(part.offset + part.size // 2)
        byte = file.read(1)
        file.seek(part.offset + part.size // 2)
        file.write(bytes([byte[0] ^ 1]))


def sequence(
    case: Case, steps: range, *, world: int = 1, workers: int = 0, seed: int | None = None
) -> tuple[list[list[Slot]], list[set[str]]]:
    """What all ranks together train on: per step its slots, and which samples were bad."""
    order = case.order(seed)
    slots: list[list[Slot]] = [[None] * case.batch for _ in steps]
    faults: list[set[str]] = [set() for _ in steps]
    for rank in range(world):
        share = share_of(range(case.batch), rank, world, case.micro_batch)
        feed = ExactFeed(
            case.catalog,
            order,
            share,
            Reader(),
            workers=workers,
            seed=order.seed,
            choice="random",
        )
        with feed:
            for number, step in enumerate(steps):
                read = feed.step(step)
                assert read.epoch == step // order.steps_per_epoch
                for positions, size, micro in zip(
                    share, read.sizes, read.micro_batches, strict=True
                ):
                    for position, sample in zip(positions, micro, strict=True):
                        if sample is not None:
                            assert tuple(sample.image.shape[-2:]) == size
                            assert slots[number][position] is None
                            slots[number][position] = (sample.key, sample.caption)
                faults[number] |= {fault.where.rpartition("!")[2] for fault in read.faults}
    return slots, faults


@pytest.mark.parametrize("number", range(CASES))
def test_the_order_of_training_is_one_sequence(tmp_path, number):
    case = make_case(tmp_path, number)
    draw = random.Random(1000 + number)
    order = case.order()
    epoch, keys = order.steps_per_epoch, set(case.catalog.keys())
    steps = range(2 * epoch)
    slots, faults = sequence(case, steps)

    # Every good sample once per epoch, every bad one named once per epoch, in its own place.
    planned = [[None if i == EMPTY else case.catalog[i].key for i in order.slots(s)] for s in steps]
    for part in (steps[:epoch], steps[epoch:]):
        trained = Counter(slot[0] for s in part for slot in slots[s] if slot)
        assert trained == Counter(keys - case.bad)
        assert Counter(key for s in part for key in faults[s]) == Counter(case.bad)
    for s in steps:
        found = [slot and slot[0] for slot in slots[s]]
        assert found == [None if key in case.bad else key for key in planned[s]]

    # The same for any number of ranks and threads.
    for world, workers in draw.sample([(w, t) for w in WORLDS for t in WORKERS], 4):
        assert sequence(case, steps, world=world, workers=workers) == (slots, faults)

    # A run that was cut goes on, also with other ranks and threads.
    for cut in {0, 1, epoch, draw.randrange(2 * epoch)} & set(steps):
        world, workers = draw.choice(WORLDS), draw.choice(WORKERS)
        resumed = sequence(case, steps[cut:], world=world, workers=workers)
        assert resumed == (slots[cut:], faults[cut:])

    # Epochs and seeds differ, wherever there is more than one order or caption to choose.
    if len(keys - case.bad) >= 8:
        assert slots[:epoch] != slots[epoch:]
        assert slots != sequence(case, steps, seed=case.seed + 1)[0]


def test_the_cases_are_as_different_as_they_should_be(tmp_path):
    cases = []
    for number in range(CASES):
        folder = tmp_path / str(number)
        folder.mkdir()
        cases.append(make_case(folder, number))
    assert {len(case.catalog.sources) for case in cases} == {1, 2, 3, 4, 5}
    assert {len(case.bad) for case in cases} == {0, 1, 2, 3}
    assert {case.micro_batch for case in cases} == {1, 2, 3}
    assert len({len(case.order().sizes) for case in cases}) >= 3
    assert any(len(case.catalog) % case.batch for case in cases)
