"""`{000000..000119}.tar` -> its names, of which there may be only so many."""

import math
import re
from itertools import islice

from asymlift.errors import BadData

MOST_NAMES = 1_000_000
RANGE = re.compile(r"\{(-?\d{1,4000})\.\.(-?\d{1,4000})(?:\.\.-?\d+)?\}")
NESTED, LIST = re.compile(r"\{[^{}]*\{"), re.compile(r"\{([^{}]*,[^{}]*)\}")


def expand_braces(pattern: str) -> list[str]:
    """Every name that the braces stand for, in order."""
    from braceexpand import braceexpand

    longest = max((abs(int(end) - int(start)) for start, end in RANGE.findall(pattern)), default=0)
    names: list[str] = []
    try:
        # Each range is made as a whole before they are combined.
        if max(longest, lists_combined(pattern)) < MOST_NAMES:
            names += islice(braceexpand(pattern), MOST_NAMES + 1)
    except ValueError as error:
        raise BadData(f"{pattern}: {error}") from None
    if not 0 < len(names) <= MOST_NAMES:
        raise BadData(
            f"{pattern}: stands for more than {MOST_NAMES:,} names; is one of its ranges too long?"
        )
    return names


def lists_combined(pattern: str) -> int:
    """How many names the lists alone stand for, where none is inside another."""
    if NESTED.search(pattern):
        return 1
    return math.prod(words.count(",") + 1 for words in LIST.findall(pattern))
