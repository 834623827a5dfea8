"""Groups of ranks that begin as copies of one process, which has imported everything already."""

import os
import signal
import socket
import sys
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NoReturn

from asymlift.errors import UserError
from asymlift.runtime import dist


@dataclass
class Group:
    """The ranks of one run, one of which gets into trouble, and how each of them ended."""

    folder: Path
    world: int
    worst: int  # the rank in trouble: if it was stopped, it goes on when the others have ended
    work: Callable[[dist.Ranks], object]
    pids: list[int] = field(default_factory=list)
    ends: dict[int, tuple[int, float]] = field(default_factory=dict)

    @property
    def mark(self) -> Path:
        """Touched when the trouble comes."""
        return self.folder / "mark"

    def start(self) -> None:
        self.folder.mkdir(parents=True)
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        for rank in range(self.world):
            pid = os.fork()
            if pid == 0:
                said = os.open(self.folder / str(rank), os.O_WRONLY | os.O_CREAT)
                os.dup2(said, 2)
                be(dist.Ranks(rank, self.world, rank), port, self.work)
            self.pids.append(pid)

    def look(self) -> bool:
        """Whether all have ended."""
        for rank, pid in enumerate(self.pids):
            if rank not in self.ends:
                ended, status = os.waitpid(pid, os.WNOHANG)
                if ended:
                    self.ends[rank] = (os.waitstatus_to_exitcode(status), self.since_trouble())
        if self.worst not in self.ends and len(self.ends) == self.world - 1:
            os.kill(self.pids[self.worst], signal.SIGCONT)
        return len(self.ends) == self.world

    def since_trouble(self) -> float:
        return time.time() - self.mark.stat().st_mtime if self.mark.exists() else 0.0

    def told(self) -> list[list[Any]]:
        """Of every rank its exit code, how long it lived after the trouble, what it said."""
        return [[*self.ends[r], (self.folder / str(r)).read_text()] for r in range(self.world)]

    def kill(self) -> None:
        for rank, pid in enumerate(self.pids):
            if rank not in self.ends:
                os.kill(pid, signal.SIGKILL)


def be(ranks: dist.Ranks, port: int, work: Callable[[dist.Ranks], object]) -> NoReturn:
    """Work as this rank, and end as the command line does."""
    names = {"RANK": ranks.rank, "WORLD_SIZE": ranks.world, "LOCAL_RANK": ranks.local}
    os.environ.update({name: str(value) for name, value in names.items()})
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    code = 0
    try:
        work(ranks)
    except UserError as error:
        sys.stderr.write(f"error: {error}\n")
        code = int(error.exit)
    except BaseException:
        traceback.print_exc()
        code = 1
    dist.end_process(code)


def run_all(groups: list[Group], seconds: float) -> None:
    """Start all groups and wait for them; whoever is left after so long is killed."""
    for group in groups:
        group.start()
    until = time.monotonic() + seconds
    while sum(group.look() for group in groups) < len(groups):
        if time.monotonic() > until:
            for group in groups:
                group.kill()
        time.sleep(0.05)
