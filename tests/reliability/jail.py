"""Run commands on hostile inputs: each in a process of its own, forked from one that has imported
everything, with a limit on its memory; then look at what it left behind.

    jail.Cell(folder)      in/ what is hostile, out/ where a command may write, victims/ what it
                           must not touch, sentinel: a file that only code from an input makes
"""

import json
import os
import pickle
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Self

ROOT = Path(__file__).parents[2]
GIB = 1 << 30
MEMORY = 3 * GIB  # of addresses, above what the imports take
PATIENCE = 60  # seconds of one command
VICTIM = b"not yours\n"


@dataclass(frozen=True)
class Outcome:
    """What became of one command; -9 is a command that was too slow."""

    exit: int
    output: str
    grown: int  # bytes of memory, at most, above what was there before it began
    seconds: float
    commands: list[str]  # of processes that it started


class Cell:
    """A folder for one attack."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.inputs, self.out = folder / "in", folder / "out"
        self.victims, self.sentinel = folder / "victims", folder / "sentinel"
        for part in (self.inputs, self.out, self.victims):
            part.mkdir(parents=True)
        (self.victims / "file").write_bytes(VICTIM)

    @property
    def command(self) -> str:
        """For a shell: what a payload does."""
        return f"touch {self.sentinel}"

    @property
    def python(self) -> str:
        return f"open({str(self.sentinel)!r}, 'w')\n"

    def pickle(self) -> bytes:
        return pickle.dumps(Payload(self.command))

    def outside(self) -> dict[str, tuple[int, int]]:
        """Everything but the outputs, and the indexes that any command may keep beside shards."""
        found = {}
        for root, folders, names in os.walk(self.folder):
            if Path(root) == self.folder:
                folders.remove(self.out.name)
            for name in (*names, *folders):
                if not name.endswith(".index.safetensors"):
                    path = Path(root) / name
                    status = path.lstat()
                    size = 0 if path.is_dir() else status.st_size
                    found[str(path.relative_to(self.folder))] = size, status.st_ino
        return found


class Payload:
    """Unpickled, it runs a command."""

    def __init__(self, command: str) -> None:
        self.command = command

    def __reduce__(self) -> tuple[Any, tuple[str]]:
        return os.system, (self.command,)


class Warden:
    """The process that has imported everything, and forks."""

    def __init__(self, environment: Mapping[str, str] | None = None) -> None:
        self.environment = environment or {}

    def __enter__(self) -> Self:
        environment = {
            **{k: v for k, v in os.environ.items() if not k.startswith(("RANK", "WORLD_SIZE"))},
            "OMP_NUM_THREADS": "1",
            "DS_ACCELERATOR": "cpu",
            "HF_HUB_OFFLINE": "1",
            "PYTHONPATH": str(ROOT),
            **self.environment,
        }
        self.process = subprocess.Popen(
            [sys.executable, "-m", "tests.reliability.jail"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env=environment,
            cwd=ROOT,
        )
        return self

    def run(self, cell: Cell, argv: Sequence[object]) -> Outcome:
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        order = {"cell": str(cell.folder), "argv": [str(word) for word in argv]}
        self.process.stdin.write(json.dumps(order) + "\n")
        self.process.stdin.flush()
        return Outcome(**json.loads(self.process.stdout.readline()))

    def __exit__(self, *error: object) -> None:
        assert self.process.stdin is not None
        self.process.stdin.close()
        self.process.wait()


# ---- inside of that process --------------------------------------------------------------------


def serve() -> None:
    import asymlift.cli  # noqa: F401
    from asymlift.runtime.engine import import_deepspeed
    from asymlift.stages import sample, verbs, verify  # noqa: F401

    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    import_deepspeed()
    for line in sys.stdin:
        order = json.loads(line)
        answers.write(json.dumps(asdict(forked(Path(order["cell"]), order["argv"]))) + "\n")
        answers.flush()


def forked(cell: Path, argv: list[str]) -> Outcome:
    started = time.monotonic()
    with tempfile.TemporaryFile() as said:
        child = os.fork()
        if child == 0:
            imprisoned(cell, argv, said.fileno())
        code, usage, commands = -9, None, set[str]()
        while usage is None:
            done, status, used = os.wait4(child, os.WNOHANG)
            if done:
                code, usage = os.waitstatus_to_exitcode(status), used
            elif time.monotonic() - started > PATIENCE:
                os.kill(child, 9)
                _, _, usage = os.wait4(child, 0)
            else:
                commands.update(started_by(child))
                time.sleep(0.01)
        said.seek(0)
        output = said.read().decode(errors="replace")
    grown = 1024 * (usage.ru_maxrss - resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)
    seconds = time.monotonic() - started
    return Outcome(code, output[-100_000:], max(grown, 0), seconds, sorted(commands))


def started_by(process: int) -> Iterator[str]:
    """The command lines of a process's children, and of theirs, as far as they are still there."""
    with suppress(OSError):
        for child in Path(f"/proc/{process}/task/{process}/children").read_text().split():
            words = Path(f"/proc/{child}/cmdline").read_bytes().replace(b"\0", b" ")
            yield words.decode(errors="replace").strip()
            yield from started_by(int(child))


def imprisoned(cell: Path, argv: list[str], said: int) -> None:
    """Never returns."""
    os.setsid()
    nothing = os.open(os.devnull, os.O_RDONLY)
    for target, source in ((0, nothing), (1, said), (2, said)):
        os.dup2(source, target)
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    limit = pages * resource.getpagesize() + MEMORY
    resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
    os.chdir(cell / "in")
    os.environ |= {"HOME": str(cell / "out"), "ASYMLIFT_CACHE": str(cell / "out/cache")}
    sys.path.insert(0, str(cell / "in"))  # as `python -m asymlift` does
    sys.argv = ["asymlift", *argv]
    from asymlift.cli import main

    code = 1
    try:
        main()
        code = 0
    except SystemExit as leaving:
        code = leaving.code if isinstance(leaving.code, int) else int(leaving.code is not None)
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


if __name__ == "__main__":
    serve()
