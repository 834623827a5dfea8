"""The order of training is a pure function, the same however many ranks share it."""

from collections import Counter

import numpy as np
import pytest

from asymlift.data import order as order_module
from asymlift.data.order import EMPTY, Order, derive, generator, share_of

SIZES = np.array([(32, 32)] * 23 + [(32, 48)] * 10 + [(48, 32)] * 1)


def test_every_sample_comes_exactly_once_per_epoch():
    order = Order(SIZES, batch=8, seed=0)
    for epoch in range(3):
        steps = range(epoch * order.steps_per_epoch, (epoch + 1) * order.steps_per_epoch)
        seen = Counter(index for step in steps for index in order.slots(step) if index != EMPTY)
        assert seen == Counter(range(len(SIZES)))


def test_a_batch_holds_one_size_and_never_nothing():
    order = Order(SIZES, batch=8, seed=1)
    for step in range(2 * order.steps_per_epoch):
        slots = order.slots(step)
        assert len(slots) == 8
        assert {tuple(SIZES[index]) for index in slots if index != EMPTY} == {order.size(step)}


def test_any_step_can_be_asked_for_first():
    straight = Order(SIZES, batch=8, seed=3)
    sequence = [straight.slots(step) for step in range(20)]
    for step in (17, 3, 11):
        assert Order(SIZES, batch=8, seed=3).slots(step) == sequence[step]


def test_an_epoch_is_shuffled_once_however_steps_at_its_border_are_asked_for(monkeypatch):
    made = []
    shuffle = order_module.permutation
    monkeypatch.setattr(order_module, "permutation", lambda *how: made.append(how) or shuffle(*how))
    order = Order(SIZES, batch=8, seed=0)
    for step in range(2 * order.steps_per_epoch):
        order.slots(step + 2)  # read ahead
        order.size(step)
    assert len(made) == 3 * (len(order.members) + 1)


def test_epochs_and_seeds_differ():
    order, other = Order(SIZES, 8, seed=0), Order(SIZES, 8, seed=1)
    epoch = order.steps_per_epoch
    first = [order.slots(step) for step in range(epoch)]
    assert first != [order.slots(step) for step in range(epoch, 2 * epoch)]
    assert first != [other.slots(step) for step in range(epoch)]


@pytest.mark.parametrize("world", [1, 2, 4])
@pytest.mark.parametrize("micro_batch", [1, 2])
def test_ranks_share_every_slot_once(world, micro_batch):
    slots = list(range(8))
    shares = [share_of(slots, rank, world, micro_batch) for rank in range(world)]

    assert sorted(i for share in shares for part in share for i in part) == slots
    assert len({len(share) for share in shares}) == 1


def test_seeds_are_stable_and_independent():
    assert derive("a", 1) == 6431086039603022688  # a run that goes on must draw the same
    assert len({derive(0, purpose, i) for purpose in "abc" for i in range(1000)}) == 3000
    assert generator(0, "x").initial_seed() == derive(0, "x")
