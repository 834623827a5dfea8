"""Files that are either whole or not there, and what it takes to know that."""

import errno
import fcntl
import hashlib
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from asymlift.errors import CannotWrite

REFUSALS = {
    *(errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOTDIR, errno.EEXIST, errno.EISDIR),
    errno.ELOOP,  # a link where none is followed
}
CHUNK = 1 << 22  # 4 MiB: above that, reading and hashing get no faster


class Busy(CannotWrite):
    """Another process holds the lock."""


def sha256_file(path: Path) -> str:
    """Hex digest of a file."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def fsync_folder(path: Path) -> None:
    """Make the names in a folder survive a power cut, as fsync does for the bytes of a file."""
    folder = os.open(path, os.O_RDONLY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)


def follow_no_link(path: str, flags: int) -> int:
    """For `open(..., opener=)`: a link that somebody left where we write leads elsewhere."""
    return os.open(path, flags | os.O_NOFOLLOW, 0o666)


def write_bytes_atomically(path: Path, data: bytes) -> None:
    """Replace a file as a whole: a reader sees the old bytes or the new ones, never a mixture."""
    part = path.with_name(path.name + ".part")
    with writing(path):
        with open(part, "wb", opener=follow_no_link) as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        part.replace(path)
        fsync_folder(path.parent)


def link_or_copy(source: Path, target: Path) -> str | None:
    """Hard-link a file (None), or copy it where that cannot be (the sha256 of what was copied)."""
    source = source.resolve()  # the hub cache is a tree of symlinks
    try:
        target.hardlink_to(source)
        return None
    except OSError as error:
        if error.errno not in (errno.EXDEV, errno.EPERM, errno.EMLINK, errno.ENOTSUP):
            raise
    return copy_file(source, target)


def copy_file(source: Path, target: Path) -> str:
    """Copy a file's bytes, following links, and return the sha256 of what was copied."""
    digest, buffer = hashlib.sha256(), memoryview(bytearray(CHUNK))
    part = target.with_name(target.name + ".part")
    with source.open("rb", buffering=0) as original, part.open("wb", buffering=0) as copy:
        while count := original.readinto(buffer):
            digest.update(buffer[:count])
            copy.write(buffer[:count])
        os.fsync(copy.fileno())
    part.replace(target)
    return digest.hexdigest()


def free_bytes(path: Path) -> int:
    """Free space where `path` is, or would be."""
    while not path.exists():
        path = path.absolute().parent
    return shutil.disk_usage(path).free


@contextmanager
def writing(path: Path) -> Iterator[None]:
    """Turn the system's refusal to write into an error that says where and how much is free."""
    try:
        yield
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise CannotWrite(
                f"{path}: the disk is full ({human_bytes(free_bytes(path))} free here). "
                "Free some space and run the same command again; what is finished is kept."
            ) from error
        if error.errno in REFUSALS:
            raise CannotWrite(
                f"{error.filename or path}: cannot write here ({error.strerror}). "
                "Change the permissions or choose another folder."
            ) from error
        raise


@contextmanager
def exclusive_lock(path: Path, purpose: str) -> Iterator[None]:
    """Hold the lock file at `path`, or refuse because a living process holds it.

    The kernel drops the lock when its holder dies, so a file left behind by a crash is no lock.
    """
    with writing(path):
        file = _open_locked(path, purpose)
    try:
        yield
    finally:
        with suppress(FileNotFoundError):
            path.unlink()  # while still holding it, so that nobody else's file goes
        os.close(file)


def _open_locked(path: Path, purpose: str) -> int:
    while True:
        file = os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o644)
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            holder = os.pread(file, 20, 0).decode(errors="replace").strip() or "unknown"
            os.close(file)
            raise Busy(
                f"{path}: another process (pid {holder}) is at work on {purpose}. "
                "Wait for it, or stop it and run this again."
            ) from None
        # Its last holder may have removed the file between our open and our lock.
        with suppress(FileNotFoundError):
            if path.stat().st_ino == os.fstat(file).st_ino:
                os.ftruncate(file, 0)
                os.pwrite(file, f"{os.getpid()}\n".encode(), 0)
                return file
        os.close(file)


def plural(count: int, noun: str) -> str:
    """(1, "shard") -> '1 shard', (2, "shard") -> '2 shards'."""
    return f"{count} {noun}{'' if count == 1 else 's'}"


def human_bytes(count: float) -> str:
    """1536 -> '1.5 KiB'."""
    for unit in ("bytes", "KiB", "MiB", "GiB"):
        if count < 1024:
            return f"{count:.0f} {unit}" if unit == "bytes" else f"{count:.1f} {unit}"
        count /= 1024
    return f"{count:.1f} TiB"
