"""Learning rates and averages as functions of the step."""

import pytest

from asymlift.maths.pace import karras_decay, learning_rate_factor

CONSTANT = {"kind": "constant", "warmup": 0, "decay_from": 0.0, "floor": 0.0}


def test_warm_up_is_linear_and_ends_at_one():
    factors = [learning_rate_factor(i, 100, **(CONSTANT | {"warmup": 4})) for i in range(6)]

    assert factors == [0.25, 0.5, 0.75, 1.0, 1.0, 1.0]


@pytest.mark.parametrize(("kind", "middle"), [("linear", 0.5), ("cosine", 0.5)])
def test_decay_begins_where_told_and_ends_at_the_floor(kind, middle):
    use = {"kind": kind, "warmup": 0, "decay_from": 0.5, "floor": 0.2}

    assert learning_rate_factor(49, 100, **use) == 1
    assert learning_rate_factor(50, 100, **use) == 1
    assert learning_rate_factor(75, 100, **use) == pytest.approx(0.2 + 0.8 * middle)
    assert learning_rate_factor(100, 100, **use) == pytest.approx(0.2)


def test_cosine_starts_slower_than_linear():
    early = [
        learning_rate_factor(10, 100, kind=k, warmup=0, decay_from=0.0, floor=0.0)
        for k in ("cosine", "linear")
    ]

    assert early == [pytest.approx(0.9755282581), pytest.approx(0.9)]


def test_karras_decay_copies_at_first_and_then_forgets_more_and_more_slowly():
    assert karras_decay(-3, 7) == karras_decay(0, 7) == 0
    assert karras_decay(1, 7) == pytest.approx(0.5**8)
    assert karras_decay(999, 7) == pytest.approx(0.999**8)


def test_decay_that_begins_during_warm_up_multiplies_it():
    use = {"kind": "linear", "warmup": 100, "decay_from": 0.0, "floor": 0.0}

    assert learning_rate_factor(49, 100, **use) == pytest.approx(0.5 * 0.51)
