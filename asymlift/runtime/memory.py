"""How much memory this process may still take: the machine's, or its control group's if less.

Containers and batch systems limit memory by control groups (v2, or v1 below `memory/`); a process
that takes more is killed, however much the machine has. Only the standard library is needed.
"""

import os
import resource
import sys
from collections.abc import Iterator
from pathlib import Path

MEMINFO = Path("/proc/meminfo")
OWN_GROUPS = Path("/proc/self/cgroup")
GROUPS = Path("/sys/fs/cgroup")

# The files of a group: its limit, what it uses, and the parts of that which are cached files.
V2 = ("memory.max", "memory.current", ("active_file", "inactive_file"))
V1 = (
    "memory.limit_in_bytes",
    "memory.usage_in_bytes",
    ("total_active_file", "total_inactive_file"),
)


def available_memory() -> int:
    """Bytes that can be taken without swapping and without being killed. Cached files give way."""
    left = [limit - used for limit, used in _limits()]
    return max(0, min([_machine_available(), *left]))


def container_limit() -> int | None:
    """The memory limit of the control groups that this process is in, if they have one."""
    return min((limit for limit, _ in _limits()), default=None)


def peak_of_process() -> int:
    """The most bytes that this process has held at once."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def _machine_available() -> int:
    available = _table(MEMINFO).get("MemAvailable:")
    if available is not None:
        return available * 1024
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


def _limits() -> Iterator[tuple[int, int]]:
    """Limit and use, without cached files, of every group around this process that has a limit."""
    for group, (limit_file, used_file, cached) in _groups():
        limit, used = _text(group / limit_file), _text(group / used_file)
        if limit.isdigit():  # otherwise "max", or no such file
            table = _table(group / "memory.stat")
            in_use = int(used) - sum(table.get(name, 0) for name in cached) if used else 0
            yield int(limit), max(0, in_use)


def _groups() -> Iterator[tuple[Path, tuple[str, str, tuple[str, str]]]]:
    """From the outermost inwards. In a container the outermost is its own, whatever its name."""
    for line in _text(OWN_GROUPS).splitlines() or ["0::/"]:
        _, controllers, name = line.split(":", 2)
        if controllers and "memory" not in controllers.split(","):
            continue
        group, files = (GROUPS / "memory", V1) if controllers else (GROUPS, V2)
        yield group, files
        for part in name.strip("/").split("/"):
            if part not in ("", ".."):  # "..": a group outside of what can be seen here
                group = group / part
                yield group, files


def _table(path: Path) -> dict[str, int]:
    """Lines of a name and a number."""
    lines = (line.split() for line in _text(path).splitlines())
    return {words[0]: int(words[1]) for words in lines if len(words) > 1 and words[1].isdigit()}


def _text(path: Path) -> str:
    """What a file says; "" where there is none, or none for us."""
    try:
        return path.read_text().strip()
    except OSError:
        return ""
