"""A shard is whole or absent, has the same bytes every time, and its index comes last."""

import os
import subprocess
import sys
import tarfile
import zlib
from pathlib import Path

import pytest
import torch
from safetensors.torch import load

from asymlift.artifacts.files import sha256_file
from asymlift.data import writer
from asymlift.data.pictures import decode_image
from asymlift.data.reader import Reader
from asymlift.data.records import BadSample
from asymlift.data.table import index_path, index_shard, load_table
from asymlift.data.writer import Packed, packed_sample, write_shard
from asymlift.errors import CannotWrite
from tests.data.small_shards import PNG, make_sample


@pytest.fixture
def shard(tmp_path: Path) -> Path:
    write_shard(tmp_path / "000000.tar", (make_sample(i) for i in range(6)))
    return tmp_path / "000000.tar"


def test_a_sample_comes_back_exactly(shard):
    table, reader = load_table(shard, index_path(shard)), Reader()
    for number in range(6):
        record = table.record(number)
        made, read = make_sample(number), reader.read(record)
        assert (read.key, read.caption) == (made.key, made.caption)
        assert read.facts == {"source": "test", "width": 24, "height": 16}
        assert (record.width, record.height) == (24, 16)
        assert torch.equal(read.image, made.image)
        assert torch.equal(read.latent, made.latent)
        assert torch.equal(read.text["hidden"], made.text["hidden"].float())


def test_webdataset_reads_what_we_read(shard):
    os.environ["WDS_SECURE"] = "1"
    import webdataset

    table, reader = load_table(shard, index_path(shard)), Reader()
    streamed = list(webdataset.WebDataset(str(shard), shardshuffle=False))
    assert [theirs["__key__"] for theirs in streamed] == table.keys()
    for number, theirs in enumerate(streamed):
        ours = table.record(number)
        assert {f".{name}" for name in theirs if not name.startswith("__")} == set(ours.parts)
        for suffix in ours.parts:
            assert reader.bytes_of(ours, suffix) == theirs[suffix[1:]]
        assert torch.equal(reader.image(ours), decode_image(theirs["png"]))
        assert torch.equal(reader.latent(ours), load(theirs["latent.safetensors"])["latent"])


def test_equal_samples_give_equal_bytes_at_any_time(shard, tmp_path, monkeypatch):
    monkeypatch.setattr("time.time", lambda: 2e9)
    again = tmp_path / "again.tar"
    write_shard(again, (make_sample(i) for i in range(6)))
    assert again.read_bytes() == shard.read_bytes()
    assert index_path(again).read_bytes() == index_path(shard).read_bytes()
    with tarfile.open(shard) as tar:
        assert {(m.mtime, m.uname, m.gname) for m in tar} == {(0, "", "")}


def test_members_already_packed_are_stored_as_they_are(tmp_path):
    write_shard(tmp_path / "packed.tar", [packed_sample(make_sample(3))])
    write_shard(tmp_path / "sample.tar", [make_sample(3)])
    assert (tmp_path / "packed.tar").read_bytes() == (tmp_path / "sample.tar").read_bytes()


def test_latents_and_texts_take_the_size_that_is_asked_for():
    small, large = (packed_sample(make_sample(0), dtype) for dtype in ("float16", "float32"))
    assert len(small.members[".latent.safetensors"]) < len(large.members[".latent.safetensors"])


def test_the_index_knows_what_the_shard_is_and_what_it_was_made_with(tmp_path):
    path = tmp_path / "000000.tar"
    table = write_shard(path, [make_sample(0)], made={"vae": "sha256:0"})
    assert table.facts == {
        "bytes": path.stat().st_size,
        "sha256": sha256_file(path),
        "made": {"vae": "sha256:0"},
    }
    loaded = load_table(path, index_path(path))
    assert (loaded.facts, loaded.made) == (table.facts, {"vae": "sha256:0"})
    assert write_shard(path, [make_sample(0)]).made is None
    for part in loaded.record(0).parts.values():
        assert part.crc == zlib.crc32(path.read_bytes()[part.offset :][: part.size])
    scanned = index_shard(path)  # without the index the same spans are found
    assert {s: c.tolist() for s, c in scanned.spans.items()} == {
        s: c.tolist() for s, c in loaded.spans.items()
    }


@pytest.mark.parametrize("suffix", sorted(packed_sample(make_sample(0)).members))
def test_a_byte_that_changed_in_any_member_is_noticed(shard, suffix):
    record = load_table(shard, index_path(shard)).record(2)
    part = record.parts[suffix]
    whole = bytearray(shard.read_bytes())
    whole[part.offset + part.size // 2] ^= 1
    shard.write_bytes(whole)
    with pytest.raises(BadSample, match=rf"000002: changed since it was indexed \({suffix}\)"):
        Reader().read(record)


def test_a_writer_that_fails_leaves_nothing(tmp_path):
    def failing():
        yield make_sample(0)
        raise RuntimeError("disk on fire")

    with pytest.raises(RuntimeError):
        write_shard(tmp_path / "000000.tar", failing())
    assert list(tmp_path.iterdir()) == []


def test_a_writer_that_fails_leaves_an_older_shard_as_it_was(shard):
    before = {path.name: path.read_bytes() for path in shard.parent.iterdir()}
    with pytest.raises(BadSample):
        write_shard(shard, [make_sample(9), make_sample(9)])
    assert {path.name: path.read_bytes() for path in shard.parent.iterdir()} == before


def test_a_writer_that_is_killed_leaves_nothing_under_the_name_of_a_shard(tmp_path):
    program = (
        "import time, sys\nfrom pathlib import Path\n"
        "from tests.data.small_shards import make_sample\n"
        "from asymlift.data.writer import write_shard\n"
        "def slow():\n    for i in range(1000):\n        yield make_sample(i)\n"
        "        print(i, flush=True)\n        time.sleep(i > 20)\n"
        f"write_shard(Path({str(tmp_path / '000000.tar')!r}), slow())\n"
    )
    command = [sys.executable, "-c", program]
    with subprocess.Popen(command, stdout=subprocess.PIPE, cwd=Path(__file__).parents[2]) as child:
        assert child.stdout is not None
        while child.stdout.readline().strip() != b"21":
            assert child.poll() is None
        child.kill()
    assert list(tmp_path.glob("[!.]*")) == []
    write_shard(tmp_path / "000000.tar", [make_sample(0)])
    assert sorted(path.name for path in tmp_path.glob("[!.]*")) == [
        "000000.index.safetensors",
        "000000.tar",
    ]


def test_an_older_index_is_gone_before_its_shard_is_replaced(shard, monkeypatch):
    """Killed at any moment: no index ever stands beside a shard that it does not describe."""
    seen = []

    def replace(self, target):
        seen.append((self.name, index_path(shard).exists(), shard.stat().st_size))
        return real(self, target)

    real = Path.replace
    monkeypatch.setattr(Path, "replace", replace)
    old = shard.stat().st_size
    write_shard(shard, [make_sample(9)])
    of_shard, *of_index = seen
    assert of_shard[0].startswith(".000000.tar") and of_shard[1:] == (False, old)
    assert of_index and all(size == shard.stat().st_size for *_, size in of_index)


@pytest.mark.parametrize(
    ("key", "reason"),
    [
        ("a/b", "path"),
        ("a.b", "dot"),
        ("", "without key"),
        ("a\nb", "unprintable"),
        ("\udce9", "unprintable"),
    ],
)
def test_keys_that_would_not_come_back_are_not_written(tmp_path, key, reason):
    with pytest.raises(BadSample, match=reason) as caught:
        write_shard(tmp_path / "000000.tar", [Packed(key, {".png": PNG}, 8, 8)])
    assert str(caught.value).isprintable()


def test_a_key_is_written_once(tmp_path):
    with pytest.raises(BadSample, match=r"000000\.tar!000000: duplicate key"):
        write_shard(tmp_path / "000000.tar", [make_sample(0), make_sample(0)])


def test_long_and_foreign_keys_come_back(tmp_path):
    keys = ["k" * 150, "caf\u00e9", "\u732b" * 60]
    table = write_shard(tmp_path / "a.tar", [make_sample(i, key=key) for i, key in enumerate(keys)])
    assert table.keys() == keys
    assert load_table(tmp_path / "a.tar", index_path(tmp_path / "a.tar")).keys() == keys


def test_a_shard_of_no_samples_is_one(tmp_path):
    assert len(write_shard(tmp_path / "a.tar", [])) == 0
    assert len(load_table(tmp_path / "a.tar", index_path(tmp_path / "a.tar"))) == 0


def test_others_may_read_what_was_written(shard):
    mask = os.umask(0)
    os.umask(mask)
    for path in (shard, index_path(shard)):
        assert path.stat().st_mode & 0o777 == 0o666 & ~mask


def test_a_folder_that_is_none_is_said(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(CannotWrite, match="cannot write here"):
        write_shard(tmp_path / "file" / "000000.tar", [make_sample(0)])


def test_a_shard_that_was_not_written_as_meant_is_our_own_mistake(tmp_path, monkeypatch):
    monkeypatch.setattr(writer, "members_of", lambda *_: ({}, []))
    with pytest.raises(AssertionError, match="not written as meant"):
        write_shard(tmp_path / "a.tar", [make_sample(0)])
    assert not index_path(tmp_path / "a.tar").exists()
