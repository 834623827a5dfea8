"""Whether all ranks see one folder: on several machines it has to be on a shared file system."""

import secrets
import socket
import time
from pathlib import Path

from asymlift.artifacts.files import write_bytes_atomically
from asymlift.errors import CannotWrite
from asymlift.runtime import dist
from asymlift.runtime.launch import Ranks

PATIENCE = 10.0  # seconds that a network file system may take to show a new file


def check_shared(folder: Path, ranks: Ranks, *, patience: float = PATIENCE) -> None:
    """Refuse a folder that another rank does not share with rank 0. Every rank has to call."""
    if ranks.world == 1:
        return
    token = folder / f".shared-{secrets.token_hex(8)}"

    def write() -> tuple[str, str]:
        write_bytes_atomically(token, socket.gethostname().encode())
        return token.name, socket.gethostname()

    name, host = dist.first_does(ranks, write)

    def look() -> None:
        until = time.monotonic() + patience
        while not (folder / name).is_file():
            if time.monotonic() > until:
                raise CannotWrite(
                    f"{folder}: on rank {ranks.rank} ({socket.gethostname()}) this is not the "
                    f"folder that rank 0 ({host}) writes to.\n"
                    "Put `runs` on a file system that all machines share, under one path"
                )
            time.sleep(0.1)

    try:
        dist.all_do(ranks, look)
    finally:
        token.unlink(missing_ok=True)
