"""Files are whole or not there; locks die with their holder."""

import errno
import os
import subprocess
import sys
from pathlib import Path

import pytest

from asymlift.artifacts import files
from asymlift.artifacts.files import (
    exclusive_lock,
    human_bytes,
    link_or_copy,
    plural,
    sha256_file,
    write_bytes_atomically,
)
from asymlift.errors import CannotWrite

HOLD_AND_DIE = """
import os, sys
from pathlib import Path
from asymlift.artifacts.files import exclusive_lock
with exclusive_lock(Path(sys.argv[1]), "x"):
    os._exit(9)
"""


def test_a_file_is_replaced_as_a_whole(tmp_path):
    write_bytes_atomically(tmp_path / "file", b"old")
    write_bytes_atomically(tmp_path / "file", b"new")
    assert (tmp_path / "file").read_bytes() == b"new"
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def test_a_link_shares_the_bytes_and_follows_symlinks(tmp_path):
    (tmp_path / "blob").write_bytes(b"weights")
    (tmp_path / "name").symlink_to("blob")  # as the hub cache does
    assert link_or_copy(tmp_path / "name", tmp_path / "link") is None
    assert not (tmp_path / "link").is_symlink()
    assert (tmp_path / "link").samefile(tmp_path / "blob")


def test_where_links_cannot_be_made_the_file_is_copied(tmp_path, monkeypatch):
    def no_links(self, target):
        raise OSError(errno.EXDEV, "Invalid cross-device link")

    monkeypatch.setattr(Path, "hardlink_to", no_links)
    (tmp_path / "file").write_bytes(b"weights")
    sha256 = link_or_copy(tmp_path / "file", tmp_path / "copy")
    assert sha256 == sha256_file(tmp_path / "copy") == sha256_file(tmp_path / "file")
    assert not (tmp_path / "copy").samefile(tmp_path / "file")


def test_a_second_holder_is_refused_with_the_pid_of_the_first(tmp_path):
    lock = tmp_path / ".lock"
    refused = pytest.raises(CannotWrite, match=f"pid {os.getpid()}")
    with exclusive_lock(lock, "x"), refused, exclusive_lock(lock, "x"):
        pass
    assert not lock.exists()


def test_the_lock_of_a_dead_process_is_no_lock(tmp_path):
    lock = tmp_path / ".lock"
    code = subprocess.run([sys.executable, "-c", HOLD_AND_DIE, str(lock)]).returncode
    assert code == 9
    assert lock.exists()
    with exclusive_lock(lock, "x"):
        assert lock.read_text() == f"{os.getpid()}\n"


def test_a_full_disk_is_an_error_that_says_where_and_how_much_is_free(tmp_path, monkeypatch):
    def full(descriptor):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(files.os, "fsync", full)
    with pytest.raises(CannotWrite, match=r"file: the disk is full \([\d.]+ .iB free here\)"):
        write_bytes_atomically(tmp_path / "file", b"data")


def test_a_folder_in_the_place_of_a_file_is_named(tmp_path):
    with pytest.raises(CannotWrite, match=r"taken: cannot write here \(Is a directory\)"):
        (tmp_path / "taken").mkdir()
        with files.writing(tmp_path):
            (tmp_path / "taken").write_bytes(b"x")


def test_sizes_are_readable():
    assert [human_bytes(n) for n in (5, 1536, 3 * 2**30, 2**42)] == [
        "5 bytes",
        "1.5 KiB",
        "3.0 GiB",
        "4.0 TiB",
    ]


def test_one_is_no_plural():
    assert [plural(n, "shard") for n in (0, 1, 2)] == ["0 shards", "1 shard", "2 shards"]
