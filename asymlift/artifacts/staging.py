"""A folder that is built beside its target and takes its place by one rename.

Next to `lifted/` lie, while it is being made, `.lifted.lock` and `.lifted.work/`: `new/` is the
folder to be, `old/` the one it replaces, `done.jsonl` the files that need not be made again after
a crash, `identity` what is being made. At every instant the target is whole (old or new) or absent.
"""

import json
import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from asymlift.artifacts import manifest
from asymlift.artifacts.files import (
    copy_file,
    exclusive_lock,
    fsync_folder,
    link_or_copy,
    sha256_file,
    write_bytes_atomically,
    writing,
)
from asymlift.artifacts.parsing import parse_json
from asymlift.errors import BadData

LARGE = 1 << 26  # bytes; what people edit is smaller, even a tokenizer of 256,000 words (34 MB)


def is_shared(source: Path) -> bool:
    """Whether a file taken over is linked: weights, and what else is too large to copy lightly.

    Whoever edits a linked file in place edits both folders, so all that is edited is copied.
    """
    return source.suffix == ".safetensors" or source.stat().st_size >= LARGE


class StagedFolder:
    """One conversion under way; make one with `staged_folder`."""

    def __init__(self, target: Path) -> None:
        self.target = target
        self.work = target.with_name(f".{target.name}.work")
        self.new = self.work / "new"
        self.sha256: dict[str, str] = {}  # of every file in the folder so far
        self._done: dict[str, tuple[str, str]] = {}  # finished earlier: its sha256, its origin's

    def begin(self, identity: str) -> bool:
        """Go on with what a killed run left; False if that was something else and is gone now."""
        note = self.work / "identity"
        same = note.is_file() and note.read_bytes() == identity.encode()
        stale = self.new.exists() and not same
        with writing(self.work):
            self.work.mkdir(exist_ok=True)
            if not same:
                shutil.rmtree(self.new, ignore_errors=True)
                self._log.unlink(missing_ok=True)
                write_bytes_atomically(note, identity.encode())
            self.new.mkdir(exist_ok=True)
            (self.new / manifest.NAME).unlink(missing_ok=True)
        self._done = dict(self._finished())
        return not stale

    def make(self, name: str, build: Callable[[Path], str], origin: Callable[[], str]) -> bool:
        """Have `build(path)` write a file and return its sha256.

        False if an earlier run had finished it, from a file whose sha256 was `origin()` then too.
        """
        path = self._place(name)
        if self._is_finished(name, path, origin):
            return False
        with writing(path):
            path.unlink(missing_ok=True)
            self._finish(name, build(path), origin())
        return True

    def write(self, name: str, data: bytes) -> None:
        """A small file, made anew every time."""
        write_bytes_atomically(self._place(name), data)
        self.sha256[name] = sha256_file(self.new / name)

    def take(self, name: str, source: Path, sha256: Callable[[], str]) -> bool:
        """Take a file over as it is; True if that cost no space. A copy is not made twice."""
        path, shared, copied = self._place(name), is_shared(source), None
        if self._is_finished(name, path, sha256):
            return False
        with writing(path):
            if not (shared and path.exists() and path.samefile(source)):
                path.unlink(missing_ok=True)
                copied = link_or_copy(source, path) if shared else copy_file(source, path)
            self.sha256[name] = sha256()
            if copied not in (None, self.sha256[name]):
                raise BadData(f"{source}: changed while it was copied. Run the same command again.")
            if copied:
                self._finish(name, copied, copied)
        return copied is None

    def can_link(self, source: Path) -> bool:
        """Whether files beside `source` can be linked into this folder."""
        probe = self.work / "probe"
        with writing(probe):
            probe.unlink(missing_ok=True)
            copied = link_or_copy(source, probe)
            probe.unlink()
        return copied is None

    def commit(self, *, kind: str, facts: dict[str, Any]) -> None:
        """Write the manifest and put the folder where it belongs, replacing what is there."""
        with writing(self.target):
            for name in set(manifest.list_files(self.new)) - set(self.sha256):
                (self.new / name).unlink()  # a half-written file of a killed run
            for root, _, _ in os.walk(self.new):
                fsync_folder(Path(root))
            manifest.write_manifest(self.new, kind=kind, facts=facts, known=self.sha256)
            old = self.work / "old"
            if self.target.exists():
                shutil.rmtree(old, ignore_errors=True)
                self.target.rename(old)
            self.new.rename(self.target)
            fsync_folder(self.target.parent)
        self.clear()

    def discard(self) -> None:
        """Throw the new folder away; what it would have replaced stays."""
        shutil.rmtree(self.new, ignore_errors=True)
        self.clear()

    def clear(self) -> None:
        """Remove what is left beside a target that is whole."""
        if self.target.exists() or not (self.work / "old").exists():
            shutil.rmtree(self.work, ignore_errors=True)

    @property
    def _log(self) -> Path:
        return self.work / "done.jsonl"

    def _is_finished(self, name: str, path: Path, origin: Callable[[], str]) -> bool:
        sha256, made_from = self._done.get(name, ("", ""))
        if sha256 and path.is_file() and made_from == origin() and sha256_file(path) == sha256:
            self.sha256[name] = sha256
            return True
        return False

    def _finish(self, name: str, sha256: str, origin: str) -> None:
        self.sha256[name] = sha256
        with self._log.open("ab", buffering=0) as log:
            log.write(json.dumps([name, sha256, origin]).encode() + b"\n")
            os.fsync(log.fileno())

    def _place(self, name: str) -> Path:
        path = self.new / name
        assert path.resolve().is_relative_to(self.new.resolve()), f"{name} leads out of {self.new}"
        with writing(path):
            path.parent.mkdir(parents=True, exist_ok=True)
        return path

    def _finished(self) -> Iterator[tuple[str, tuple[str, str]]]:
        lines = self._log.read_bytes().splitlines() if self._log.exists() else []
        for line in lines:
            with suppress(ValueError):  # the last line may have been cut
                name, sha256, origin = parse_json(line)
                yield name, (sha256, origin)


@contextmanager
def staged_folder(target: Path, purpose: str) -> Iterator[StagedFolder]:
    """Hold the lock on a target while its replacement is made."""
    with writing(target):
        target.parent.mkdir(parents=True, exist_ok=True)
    with exclusive_lock(target.with_name(f".{target.name}.lock"), purpose):
        yield StagedFolder(target)
