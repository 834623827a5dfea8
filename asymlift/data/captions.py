"""Which caption a sample is trained on: a draw that depends on (seed, epoch, key) alone."""

from collections.abc import Sequence
from typing import Literal

from asymlift.data.order import derive

Choice = Literal["first", "random", "longest"]


def chosen_caption(captions: Sequence[str], choice: Choice, seed: int, epoch: int, key: str) -> int:
    """The number of the caption, out of several for one image."""
    if choice == "longest":
        return max(range(len(captions)), key=lambda number: len(captions[number]))
    if choice == "random":
        return derive(seed, "caption", epoch, key) % len(captions)
    return 0


def is_dropped(share: float, seed: int, epoch: int, key: str) -> bool:
    """Whether this epoch trains this sample on the empty caption, or without its class."""
    return derive(seed, "caption dropout", epoch, key) / 2**63 < share
