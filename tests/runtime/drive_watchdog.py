"""Groups of three ranks that add numbers up until trouble comes: drive_watchdog.py LIMIT TROUBLES.

TROUBLES is JSON, a list of "RANK WHAT": in its fourth step that rank gets a signal, hangs or
fails. All groups run at once. Prints JSON: of every rank its exit code, how long it lived after
the trouble, and what it said. Whoever was stopped goes on when the others have ended.
"""

import json
import os
import signal
import socket
import sys
import tempfile
import time
import traceback
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NoReturn

import torch

from asymlift.errors import BadData, UserError
from asymlift.runtime import dist, watch
from asymlift.runtime.watchdog import MARGIN, watched

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


def add_up(ranks: dist.Ranks, rank: int, trouble: str, mark: Path) -> None:
    for step in range(1, STEPS + 1):
        watch.at(step, "reading data", f"sample {step}")
        if step == WORST:
            time.sleep(1)  # for the others to have heard of it
            if ranks.rank == rank:
                mark.touch()
                get_into(trouble)
        watch.at(step, "adding up")
        dist.summed(torch.ones(1))


def be(ranks: dist.Ranks, limit: int, trouble: str, port: int, mark: Path) -> NoReturn:
    os.environ.update(RANK=str(ranks.rank), WORLD_SIZE=str(ranks.world), LOCAL_RANK="0")
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    code = 0
    try:
        dist.join(ranks, torch.device("cpu"), limit + MARGIN)
        rank, what = trouble.split()
        with watched(ranks, limit):
            add_up(ranks, int(rank), what, mark)
    except UserError as error:
        sys.stderr.write(f"error: {error}\n")
        code = int(error.exit)
    except BaseException:
        traceback.print_exc()
        code = 1
    dist.end_process(code)


@dataclass
class Group:
    """Three processes, the trouble of one of them, and how each ended."""

    trouble: str
    folder: Path
    pids: list[int] = field(default_factory=list)
    ends: dict[int, tuple[int, float]] = field(default_factory=dict)

    def start(self, limit: int) -> None:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        for rank in range(WORLD):
            pid = os.fork()
            if pid == 0:
                said = os.open(self.folder / str(rank), os.O_WRONLY | os.O_CREAT)
                os.dup2(said, 2)
                be(dist.Ranks(rank, WORLD, 0), limit, self.trouble, port, self.folder / "mark")
            self.pids.append(pid)

    def look(self) -> bool:
        """Whether all have ended."""
        for rank, pid in enumerate(self.pids):
            if rank not in self.ends:
                ended, status = os.waitpid(pid, os.WNOHANG)
                if ended:
                    code = os.waitstatus_to_exitcode(status)
                    self.ends[rank] = (code, time.time() - (self.folder / "mark").stat().st_mtime)
        if self.trouble.endswith("SIGSTOP") and len(self.ends) == WORLD - 1:
            os.kill(self.pids[int(self.trouble.split()[0])], signal.SIGCONT)
        return len(self.ends) == WORLD

    def told(self) -> list[list[Any]]:
        return [[*self.ends[r], (self.folder / str(r)).read_text()] for r in range(WORLD)]


def main() -> None:
    torch.set_num_threads(1)
    limit, troubles = int(sys.argv[1]), json.loads(sys.argv[2])
    with tempfile.TemporaryDirectory() as folder:
        groups = []
        for number, trouble in enumerate(troubles):
            group = Group(trouble, Path(folder) / str(number))
            group.folder.mkdir()
            group.start(limit)
            groups.append(group)
        until = time.monotonic() + 90
        while sum(group.look() for group in groups) < len(groups):
            if time.monotonic() > until:
                for group in groups:
                    for rank, pid in enumerate(group.pids):
                        if rank not in group.ends:
                            os.kill(pid, signal.SIGKILL)
            time.sleep(0.05)
        print(json.dumps({group.trouble: group.told() for group in groups}))


if __name__ == "__main__":
    main()
