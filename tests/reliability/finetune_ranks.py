"""The command `asymlift finetune` on several ranks, each a process that can be killed or asked.

A rank is forked from a process that has imported torch and DeepSpeed, which saves a start three
quarters of its time; what it runs is the command line.
"""

import importlib
import json
import os
import re
import runpy
import signal
import socket
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
KILLED = -int(signal.SIGKILL)

# With DeepSpeed's defaults a small model stays whole on every rank, and ZeRO-3 proves nothing.
NOTHING_STAYS = {
    "stage3_param_persistence_threshold": 0,
    "stage3_max_live_parameters": 0,
    "stage3_max_reuse_distance": 0,
    "stage3_prefetch_bucket_size": 0,
}


def get_ready() -> None:
    """Import what a finetune imports, and let ZeRO-3 keep nothing."""
    os.environ.update(DS_ACCELERATOR="cpu", OMP_NUM_THREADS="1")
    import torch

    import asymlift.embedded.build
    import asymlift.model.sampling
    import asymlift.stages.verbs  # noqa: F401
    from asymlift.runtime.engine import import_deepspeed

    torch.set_num_threads(1)
    deepspeed = import_deepspeed()
    for late in ("peft", "deepspeed.runtime.zero.muon.original_muon"):  # two seconds each
        importlib.import_module(late)

    initialize = deepspeed.initialize

    def keeping_nothing(**arguments: Any) -> Any:
        zero = arguments["config"]["zero_optimization"]
        if zero["stage"] == 3:
            zero.update(NOTHING_STAYS)
        return initialize(**arguments)

    deepspeed.initialize = keeping_nothing


def environment(rank: int, world: int, port: int) -> dict[str, str]:
    return {
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": str(world),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "OMP_NUM_THREADS": "1",
        "DS_ACCELERATOR": "cpu",
        "PYTHONPATH": str(ROOT),
    }


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


class Group:
    """The ranks of one run that has been started; `words` are those of the command line."""

    def __init__(
        self,
        words: list[str],
        world: int,
        logs: Path,
        first: Callable[[int, dict[int, int]], None] | None = None,
    ) -> None:
        """`first(rank, pids)` is the first thing that a forked rank does; rank 0 begins last."""
        self.words, self.world, self.logs, self.first = words, world, logs, first
        self.codes: list[int | None] = [None] * world
        self.pids: dict[int, int] = {}
        logs.mkdir(parents=True, exist_ok=True)
        port = free_port()
        for rank in reversed(range(world)):
            self.log(rank).write_bytes(b"")
            self.pids[rank] = self.fork(rank, environment(rank, world, port))

    def fork(self, rank: int, variables: dict[str, str]) -> int:
        child = os.fork()
        if child:
            return child
        os.environ.update(variables)
        log = os.open(self.log(rank), os.O_WRONLY | os.O_APPEND)
        os.dup2(log, 1)
        os.dup2(log, 2)
        # A fork leaves torch's pool of threads to be made anew, which two threads at once cannot.
        sys.modules["torch"].set_num_threads(1)
        if self.first is not None:
            self.first(rank, self.pids)
        os._exit(command(self.words))

    def log(self, rank: int) -> Path:
        return self.logs / f"said-{rank}.txt"

    def said(self, rank: int = 0) -> str:
        return self.log(rank).read_text(errors="replace")

    def ended(self) -> bool:
        """Whether all have; the codes of those that have are kept."""
        for rank, pid in self.pids.items():
            if self.codes[rank] is None:
                found, status = os.waitpid(pid, os.WNOHANG)
                if found:
                    self.codes[rank] = os.waitstatus_to_exitcode(status)
        return None not in self.codes

    def signal(self, rank: int, number: int) -> None:
        if self.codes[rank] is None:
            os.kill(self.pids[rank], number)

    def wait(self, seconds: float = 900) -> list[int | None]:
        """The exit codes; who has not ended by then is killed, and has the code None."""
        until = time.monotonic() + seconds
        while not self.ended() and time.monotonic() < until:
            time.sleep(0.005)
        codes = list(self.codes)
        for rank, code in enumerate(codes):
            if code is None:
                os.kill(self.pids[rank], signal.SIGKILL)
                os.waitpid(self.pids[rank], 0)
        return codes


def command(words: list[str]) -> int:
    """Run the command line in this process; returns the exit code."""
    import traceback

    sys.argv = ["asymlift", "finetune", *words]
    try:
        runpy.run_module("asymlift", run_name="__main__")
    except SystemExit as leaving:
        return leaving.code if isinstance(leaving.code, int) else int(leaving.code is not None)
    except BaseException:
        traceback.print_exc()
        return 1
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
    return 0


def words_for(recipe: Path, overrides: list[str]) -> list[str]:
    return [str(recipe), *(word for override in overrides for word in ("--set", override))]


# ---- what a run leaves -------------------------------------------------------------------------


def resumed_from(said: str) -> int:
    """The step that a run says it went on from; 0 if it began anew."""
    found = re.search(r"resumed from .*/step-(\d+)", said)
    return int(found[1]) if found else 0


def numbers(run: Path) -> list[dict[str, Any]]:
    """metrics.jsonl to the last digit, without what is a time or a size of memory."""
    lines = (run / "metrics.jsonl").read_text().splitlines()
    return [
        {key: value for key, value in line.items() if not re.search("second|memory|gib", key)}
        for line in (json.loads(line, parse_float=str) for line in lines)
    ]


def outcome(run: Path, step: int) -> dict[str, Any]:
    """What two runs that are equal have in common, bit for bit."""
    from asymlift.artifacts.files import sha256_file

    files = [
        *(run / "checkpoints" / f"step-{step:06d}").glob("*.safetensors"),
        *(run / "samples").glob("*/*.png"),
    ]
    return {
        "numbers": numbers(run),
        "sha256": {str(path.relative_to(run)): sha256_file(path) for path in sorted(files)},
    }


def differences(expected: dict[str, Any], found: dict[str, Any]) -> list[str]:
    """One phrase per thing that is not equal."""
    problems = []
    if expected["numbers"] != found["numbers"]:
        pairs = zip(expected["numbers"], found["numbers"], strict=False)
        first = next((old for old, new in pairs if old != new), {"step": "the last"})
        problems.append(f"the numbers of step {first['step']} differ")
    old, new = expected["sha256"], found["sha256"]
    problems += [f"{name} differs" for name in sorted(old | new) if old.get(name) != new.get(name)]
    return problems
