"""Which caption a sample is trained on is a pure function of (seed, epoch, key)."""

from collections import Counter

import pytest

from asymlift.data.captions import chosen_caption, is_dropped

KEYS = [f"{number:05d}" for number in range(600)]
CAPTIONS = ["a bird", "a small red bird", "bird on a wire"]


def chosen(choice: str, seed: int = 0, epoch: int = 0) -> list[int]:
    return [chosen_caption(CAPTIONS, choice, seed, epoch, key) for key in KEYS]


def dropped(share: float, seed: int = 0, epoch: int = 0) -> list[bool]:
    return [is_dropped(share, seed, epoch, key) for key in KEYS]


def test_the_first_and_the_longest_are_the_same_in_every_epoch():
    for seed, epoch in ((0, 0), (0, 1), (7, 0)):
        assert set(chosen("first", seed, epoch)) == {0}
        assert set(chosen("longest", seed, epoch)) == {1}
    assert chosen_caption(["same", "size"], "longest", 0, 0, "key") == 0


def test_a_random_caption_follows_seed_epoch_and_key():
    assert chosen("random") == chosen("random")
    assert chosen("random") != chosen("random", seed=1)
    assert chosen("random") != chosen("random", epoch=1)
    counts = Counter(chosen("random"))
    assert all(150 < counts[number] < 250 for number in range(3))


def test_over_the_epochs_every_caption_comes_up():
    for key in KEYS[:20]:
        assert {chosen_caption(CAPTIONS, "random", 0, epoch, key) for epoch in range(30)} == {
            0,
            1,
            2,
        }


def test_a_single_caption_is_always_chosen():
    assert chosen_caption(["only"], "random", 3, 4, "key") == 0


def test_dropout_follows_seed_epoch_and_key():
    assert dropped(0.3) == dropped(0.3)
    assert dropped(0.3) != dropped(0.3, seed=1)
    assert dropped(0.3) != dropped(0.3, epoch=1)


@pytest.mark.parametrize("share", [0.0, 0.1, 0.5, 1.0])
def test_the_share_that_is_dropped_is_the_share_that_was_asked_for(share):
    epochs = [dropped(share, epoch=epoch) for epoch in range(10)]
    found = sum(map(sum, epochs)) / (10 * len(KEYS))
    assert abs(found - share) < 0.02
    assert share not in (0.0, 1.0) or found == share


def test_what_a_smaller_share_drops_a_larger_one_drops_too():
    assert all(more or not less for less, more in zip(dropped(0.1), dropped(0.3), strict=True))


def test_choice_and_dropout_are_independent_draws():
    """Else the dropped ones would all be of one caption."""
    counts = Counter(n for n, gone in zip(chosen("random"), dropped(0.5), strict=True) if gone)
    assert all(count > 60 for count in counts.values()) and len(counts) == 3
