"""Groups of three ranks that add numbers up until trouble comes: drive_watchdog.py LIMIT TROUBLES.

TROUBLES is JSON, a list of "RANK WHAT": in its fourth step that rank gets a signal, hangs or
fails. All groups run at once. Prints JSON: what forked.Group.told says of each.
"""

import json
import os
import signal
import sys
import tempfile
import time
from functools import partial
from pathlib import Path

import torch

from asymlift.errors import BadData
from asymlift.runtime import dist, watch
from asymlift.runtime.watchdog import GRACE, MARGIN, watched
from tests.runtime.forked import Group, run_all

WORLD, STEPS, WORST = 3, 6, 4


def get_into(trouble: str) -> None:
    if trouble.startswith("SIG"):
        os.kill(os.getpid(), getattr(signal, trouble))
    elif trouble == "hang":
        watch.line_of_code = lambda: "data/reader.py:88"  # this file is not of the package
        time.sleep(1000)
    elif trouble == "memory":
        torch.empty(1 << 60)
    elif trouble == "data":
        raise BadData("a shard is gone")
    elif trouble == "mistake":
        raise ValueError("boom")


def end_as_agreed(ranks: dist.Ranks, mark: Path) -> None:
    """All ranks know it; the first one still has something to send away."""
    if ranks.first:
        mark.touch()
        watch.ends()
        time.sleep(GRACE + 1)
    raise BadData("all agree")


def add_up(ranks: dist.Ranks, limit: int, rank: int, trouble: str, mark: Path) -> None:
    dist.join(ranks, torch.device("cpu"), limit + MARGIN)
    with watched(ranks, limit):
        for step in range(1, STEPS + 1):
            watch.at(step, "reading data", f"sample {step}")
            if step == WORST:
                time.sleep(1)  # for the others to have heard of it
                if trouble == "agreed":
                    end_as_agreed(ranks, mark)
                if ranks.rank == rank:
                    mark.touch()
                    get_into(trouble)
            watch.at(step, "adding up")
            dist.summed(torch.ones(1))


def group_of(folder: Path, limit: int, trouble: str) -> Group:
    rank, what = trouble.split()
    work = partial(add_up, limit=limit, rank=int(rank), trouble=what, mark=folder / "mark")
    return Group(folder, WORLD, int(rank), work)


def main() -> None:
    torch.set_num_threads(1)
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a job in the background ignores it
    limit, troubles = int(sys.argv[1]), json.loads(sys.argv[2])
    with tempfile.TemporaryDirectory() as folder:
        groups = [group_of(Path(folder) / str(n), limit, t) for n, t in enumerate(troubles)]
        run_all(groups, 200)
        told = [group.told() for group in groups]
    print(json.dumps(dict(zip(troubles, told, strict=True))))


if __name__ == "__main__":
    main()
