"""`{000000..000119}.tar` -> its names, of which there may be only so many."""

import re
from itertools import islice

from asymlift.errors import BadData

MOST_NAMES = 1_000_000
RANGE = re.compile(r"\{(-?\d{1,4000})\.\.(-?\d{1,4000})(?:\.\.-?\d+)?\}")


def expand_braces(pattern: str) -> list[str]:
    """Every name that the braces stand for, in order."""
    from braceexpand import braceexpand

    longest = max((abs(int(end) - int(start)) for start, end in RANGE.findall(pattern)), default=0)
    names: list[str] = []
    try:
        if longest < MOST_NAMES:  # each range is made as a whole before they are combined
            names += islice(braceexpand(pattern), MOST_NAMES + 1)
    except ValueError as error:
        raise BadData(f"{pattern}: {error}") from None
    if not 0 < len(names) <= MOST_NAMES:
        raise BadData(
            f"{pattern}: stands for more than {MOST_NAMES:,} names; is one of its ranges too long?"
        )
    return names
