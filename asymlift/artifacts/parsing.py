"""Small files and JSON from anywhere: what never ends, or is nested too deeply, is refused.

What is written for others is JSON that every reader takes.
"""

import errno
import json
import math
import os
import stat
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

# Bytes: room for a hundred thousand tensors by name, where the largest models have some thousand.
# It has to be small, as lists of nothing take thirty times as much memory as text.
MOST_JSON = 1 << 24


def parse_json(text: str | bytes, object_pairs_hook: Callable[..., Any] | None = None) -> Any:
    """`json.loads`, of which ValueError is the only error."""
    try:
        return json.loads(text, object_pairs_hook=object_pairs_hook)
    except RecursionError:
        raise ValueError("nested too deeply") from None


def json_text(document: Any, indent: int | None = None) -> str:
    """Strict JSON: what is not finite is null, as it has no words for NaN."""
    return json.dumps(finite_or_null(document), indent=indent, default=str, allow_nan=False)


def finite_or_null(value: Any) -> Any:
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {key: finite_or_null(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [finite_or_null(inner) for inner in value]
    return value


def read_small(path: Path, most: int = MOST_JSON) -> bytes:
    """A file of at most so many bytes; OSError for a larger one, a device or a pipe."""
    handle = os.open(path, os.O_RDONLY | os.O_NONBLOCK)  # a pipe that nobody feeds would wait
    with open(handle, "rb") as file:  # noqa: PTH123
        if not stat.S_ISREG(os.fstat(handle).st_mode):
            raise OSError(errno.EINVAL, "no regular file")
        data = file.read(most + 1)
    if len(data) > most:
        raise OSError(errno.EFBIG, f"it is longer than {most} bytes")
    return data
