"""Run a conversion in a forked child that dies, or finds the disk full, at a chosen operation.

Used inside a process that was started with killfs.so in LD_PRELOAD: torch is imported once, and a
child per experiment is forked from it.
"""

import ctypes
import os
import subprocess
import sys
import tempfile
import traceback
from collections.abc import Callable
from pathlib import Path

SOURCE = Path(__file__).with_name("killfs.c")
UNEXPECTED = 99


def build(folder: Path) -> Path:
    """Compile the injector; needs gcc."""
    library = folder / "killfs.so"
    subprocess.run(
        ["gcc", "-shared", "-fPIC", "-O1", "-o", str(library), str(SOURCE), "-ldl"], check=True
    )
    return library


def run_under(library: Path, module: str, *arguments: str) -> str:
    """Run `python -m module` with the injector loaded; returns what it printed."""
    environment = {**os.environ, "LD_PRELOAD": str(library), "OMP_NUM_THREADS": "1"}
    root = SOURCE.parents[2]
    process = subprocess.run(
        [sys.executable, "-m", module, *arguments],
        env=environment,
        cwd=root,
        capture_output=True,
        text=True,
    )
    assert process.returncode == 0, process.stderr[-3000:]
    return process.stdout


def quick_folder() -> tempfile.TemporaryDirectory:  # type: ignore[type-arg]
    """Somewhere to write a thousand small folders: in memory, where that exists."""
    memory = Path("/dev/shm")
    writable = memory.is_dir() and os.access(memory, os.W_OK)
    return tempfile.TemporaryDirectory(dir=memory if writable else None)


class Injector:
    """The functions of killfs.so in this process."""

    def __init__(self) -> None:
        self._library = ctypes.CDLL(None)
        self._library.killfs_count.restype = ctypes.c_long

    def kill(self, at: int, folder: Path, work: Callable[[], int]) -> int | None:
        """Exit code of `work` in a child that is killed at operation `at`; None if it was."""
        return self._fork(lambda: self._arm("killfs_arm", at, folder, work))

    def fill(self, at: int, folder: Path, work: Callable[[], int]) -> int | None:
        """The same, with a disk that is full from write number `at` on."""
        return self._fork(lambda: self._arm("killfs_fill", at, folder, work))

    def count(self, folder: Path, work: Callable[[], int]) -> int:
        """The number of operations of `work`."""
        reader, writer = os.pipe()

        def counted() -> int:
            self._arm("killfs_arm", 0, folder, work)
            os.write(writer, str(self._library.killfs_count()).encode())
            return 0

        assert self._fork(counted) == 0
        return int(os.read(reader, 20))

    def _arm(self, function: str, at: int, folder: Path, work: Callable[[], int]) -> int:
        getattr(self._library, function)(ctypes.c_long(at), str(folder).encode())
        return work()

    def _fork(self, work: Callable[[], int]) -> int | None:
        child = os.fork()
        if child == 0:
            try:
                os._exit(work())
            except BaseException:
                traceback.print_exc()
                os._exit(UNEXPECTED)
        status = os.waitpid(child, 0)[1]
        return None if os.WIFSIGNALED(status) else os.WEXITSTATUS(status)
