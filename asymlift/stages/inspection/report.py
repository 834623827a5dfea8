"""What an inspection finds, and how lists are cut to what people read."""

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

SHOWN = 5  # problems, names


@dataclass(frozen=True)
class Inspection:
    """What people read (`rows`) and what programs read (`facts`); problems are in both."""

    kind: str
    title: str
    rows: list[tuple[str, str]] = field(default_factory=list)
    facts: dict[str, Any] = field(default_factory=dict)
    problems: list[str] = field(default_factory=list)


def some_of(words: str | Iterable[str]) -> str:
    """The first few of many."""
    if isinstance(words, str):
        return words
    given = list(words)
    more = f" and {len(given) - SHOWN} more" if len(given) > SHOWN else ""
    return ", ".join(given[:SHOWN]) + more


def brief(fingerprint: str) -> str:
    """Enough of it to compare by eye; `facts` has all of it."""
    return fingerprint[:19] + "..." if fingerprint.startswith("sha256:") else fingerprint
