"""One thing that `doctor` looked at, and how it says sizes and errors."""

import traceback
from dataclasses import dataclass
from typing import Literal

Status = Literal["ok", "warn", "fail"]

GIB = 2**30


@dataclass(frozen=True)
class Check:
    """One thing looked at. Only `fail` keeps asymlift from working."""

    name: str
    status: Status
    found: str
    needed: str = ""
    remedy: str = ""


def at_least(name: str, amount: int, low: int, said: str, remedy: str) -> Check:
    if amount < low:
        return Check(name, "warn", said, f"better {gib(low)}", remedy)
    return Check(name, "ok", said)


def gib(amount: float) -> str:
    return f"{amount / GIB:.1f} GiB"


def brief(error: BaseException) -> str:
    """The first line, with the kind of error: one line says enough."""
    return traceback.format_exception_only(error)[-1].strip().splitlines()[0][:300]
