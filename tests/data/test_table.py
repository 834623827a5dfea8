"""An index says where every part of every usable sample lies, and what is wrong with the others."""

import dataclasses
import io
import os
import random
import tarfile
import threading
import time
from pathlib import Path

import numpy as np
import pytest

from asymlift.data import catalog, table
from asymlift.data.catalog import cached_index_path, indexed
from asymlift.data.reader import Reader
from asymlift.data.records import BadSample
from asymlift.data.table import (
    FORMAT,
    Table,
    index_path,
    index_shard,
    load_table,
    save_table,
)
from asymlift.data.writer import write_shard
from tests.data.small_shards import PNG, flip, make_sample, overwrite, raw_tar

BLOCK = 512


@pytest.fixture(autouse=True)
def cache(tmp_path_factory, monkeypatch):
    folder = tmp_path_factory.mktemp("cache")
    monkeypatch.setenv("ASYMLIFT_CACHE", str(folder))
    return folder


@pytest.fixture
def shard(tmp_path: Path) -> Path:
    """As written by somebody else: the same members, and no index."""
    write_shard(tmp_path / "000000.tar", (make_sample(i) for i in range(6)))
    index_path(tmp_path / "000000.tar").unlink()
    return tmp_path / "000000.tar"


def said(table: Table) -> dict[str, object]:
    """All of it, in a form that can be compared."""
    columns = {name: column.tolist() for name, column in (table.spans | table.crcs).items()}
    return {
        "keys": table.keys(),
        "sizes": table.sizes.tolist(),
        "columns": columns,
        "faults": [(f.where, f.reason, f.detail, f.count) for f in table.faults],
        "facts": table.facts,
    }


def reasons(path: Path) -> list[str]:
    return [fault.reason for fault in index_shard(path).faults]


# ---- samples -------------------------------------------------------------------------------------


def test_members_become_samples_with_the_suffixes_that_we_know(tmp_path):
    members = [("a.png", PNG), ("a.TXT", b"hi"), ("a.cls", b"3"), ("a.text7.safetensors", b"x")]
    (record,) = (index_shard(raw_tar(tmp_path / "a.tar", members)).record(i) for i in range(1))
    assert (record.key, record.where) == ("a", f"{tmp_path}/a.tar!a")
    assert set(record.parts) == {".png", ".txt", ".text7.safetensors"}
    assert Reader().captions(record, {}) == ["hi"]


def test_the_size_comes_from_the_image_where_the_facts_do_not_tell(tmp_path):
    facts = {
        "told": b'{"width": 9, "height": 7}',
        "broken": b"[1",
        "list": b"[]",
        "words": b'{"width": "8", "height": "8"}',
        "negative": b'{"width": -1, "height": 8}',
        "deep": b"[" * 100_000,
    }
    members = [m for key in facts for m in ((f"{key}.json", facts[key]), (f"{key}.png", PNG))]
    found = index_shard(raw_tar(tmp_path / "a.tar", [*members, ("text.txt", b"x")]))
    sizes = dict(zip(found.keys(), map(tuple, found.sizes.tolist()), strict=True))
    assert sizes == {**dict.fromkeys(facts, (8, 8)), "told": (9, 7), "text": (0, 0)}


def test_a_size_that_no_picture_has_is_none(tmp_path):
    facts = b'{"width": 99999999999, "height": 8}'
    found = index_shard(raw_tar(tmp_path / "a.tar", [("a.json", facts), ("a.png", PNG)]))
    assert found.sizes.tolist() == [[0, 0]]


def test_a_header_longer_than_what_is_read_first_is_read_to_its_end(tmp_path):
    from PIL import Image

    stream = io.BytesIO()
    Image.new("RGB", (8, 6)).save(stream, "JPEG", icc_profile=bytes(200_000))
    assert index_shard(
        raw_tar(tmp_path / "a.tar", [("a.jpg", stream.getvalue())])
    ).sizes.tolist() == [[8, 6]]


GOOD = ("good.png", PNG)
FAULTS = {
    "duplicate suffix": [("bad.png", PNG), ("bad.png", PNG), GOOD],
    "duplicate key": [("bad.png", PNG), GOOD, ("bad.txt", b"later")],
    "empty member": [("bad.png", b""), GOOD],
    "two images": [("bad.png", PNG), ("bad.webp", PNG), GOOD],
    "key with a path in it": [("../../bad.png", PNG), GOOD],
    "member without key or suffix": [(".bad", b"x"), GOOD],
    "key with unprintable characters": [("bad\x1b[2J.png", PNG), GOOD],
}


def test_a_text_longer_than_any_caption_is_refused(tmp_path):
    text = b" " * (table.MOST_TEXT + 1)
    members = [("a.png", PNG), ("a.txt", text), ("b.png", PNG), ("b.json", text), ("c.png", PNG)]
    found = index_shard(raw_tar(tmp_path / "a.tar", members))
    assert found.keys() == ["c"]
    assert {fault.reason for fault in found.faults} == {"member is too large"}


def test_a_part_that_would_fill_the_memory_is_refused_and_never_read(tmp_path, monkeypatch):
    monkeypatch.setattr(table, "MOST_BYTES", 1000)
    members = [
        ("bad.json", b" " * 2000),
        ("bad.png", PNG),
        ("good.png", PNG),
        ("good.bin", b"x" * 2000),
    ]
    found = index_shard(raw_tar(tmp_path / "a.tar", members))
    assert found.keys() == ["good"]
    assert [str(f) for f in found.faults] == [
        f"{tmp_path}/a.tar!bad: member is too large (.json, 2000 bytes)"
    ]


@pytest.mark.parametrize("reason", FAULTS)
def test_a_wrong_sample_is_left_out_and_reported(tmp_path, reason):
    found = index_shard(raw_tar(tmp_path / "a.tar", FAULTS[reason]))
    assert found.keys() == ["good"]
    (fault,) = found.faults
    assert (fault.reason, fault.count) == (reason, 1)
    assert str(fault).startswith(f"{tmp_path}/a.tar!") and str(fault).isprintable()


@pytest.mark.parametrize("name", ["/etc/bad.png", "./bad.png", "a/bad.png", "..\\bad.png"])
def test_no_path_becomes_a_key(tmp_path, name):
    found = index_shard(raw_tar(tmp_path / "a.tar", [(name, PNG)]))
    assert not len(found)
    assert [fault.reason for fault in found.faults] == ["key with a path in it"]
    assert "pack the files without folders" in str(found.faults[0])


@pytest.mark.parametrize("kind", [tarfile.SYMTYPE, tarfile.LNKTYPE])
def test_links_are_not_followed(tmp_path, kind):
    with tarfile.open(tmp_path / "a.tar", "w", format=tarfile.USTAR_FORMAT) as tar:
        link = tarfile.TarInfo("bad.png")
        link.type, link.linkname = kind, "/etc/passwd"
        tar.addfile(link)
    found = index_shard(tmp_path / "a.tar")
    assert [str(f) for f in found.faults] == [f"{tmp_path}/a.tar!bad: not a plain file (bad.png)"]
    assert not len(found)


def test_a_missing_or_unreadable_shard_is_a_fault(tmp_path):
    assert reasons(tmp_path / "nowhere.tar") == ["shard is missing"]
    assert reasons(tmp_path) == ["shard cannot be read"]


def test_a_disk_that_fails_while_indexing_is_a_fault(shard, monkeypatch):
    def fail(*_: object) -> bytes:
        raise OSError(5, "Input/output error")

    monkeypatch.setattr("os.pread", fail)
    (fault,) = index_shard(shard).faults
    assert str(fault) == f"{shard}: shard cannot be read (Input/output error)"


# ---- what damage costs ---------------------------------------------------------------------------


def members(path: Path) -> list[tarfile.TarInfo]:
    with tarfile.open(path) as tar:
        return list(tar)


@pytest.mark.parametrize("which", range(30))
def test_a_lost_header_costs_one_sample(shard, which):
    member = members(shard)[which]
    overwrite(shard, member.offset, bytes(BLOCK))
    found = index_shard(shard)
    lost = member.name.partition(".")[0]
    assert found.keys() == [f"{n:06d}" for n in range(6) if f"{n:06d}" != lost]
    assert {fault.reason for fault in found.faults} == {"shard is damaged"}
    assert any(f"!{lost}: shard is damaged" in str(fault) for fault in found.faults)


def test_a_cut_costs_what_lies_behind_it(shard):
    parts = members(shard)
    whole = shard.read_bytes()
    for place, num_left in (
        (parts[8].offset_data + 5, 1),  # inside a member
        (parts[8].offset + 100, 1),  # inside a header
        (parts[8].offset, 1),  # between members of a sample
        (parts[10].offset, 2),  # between samples
        (parts[29].offset_data + parts[29].size, 6),  # of the end alone
    ):
        shard.write_bytes(whole[:place])
        found = index_shard(shard)
        assert len(found) == num_left
        assert {fault.reason for fault in found.faults} == {"shard is cut off"}


def test_a_sample_whose_parts_nobody_can_miss_is_kept(tmp_path):
    """A picture without caption between pictures with captions is no damage."""
    path = raw_tar(
        tmp_path / "a.tar",
        [("a.png", PNG), ("a.txt", b"x"), ("b.png", PNG), ("c.png", PNG), ("c.txt", b"x")],
    )
    assert index_shard(path).keys() == ["a", "b", "c"]


def test_random_damage_never_loses_a_sample_that_it_does_not_touch(shard):
    whole, parts, draw = shard.read_bytes(), members(shard), random.Random(0)
    end, started = parts[-1].offset_data + parts[-1].size - 1, time.monotonic()
    span = {
        f"{n:06d}": range(parts[5 * n].offset, parts[5 * n + 4].offset_data + parts[5 * n + 4].size)
        for n in range(6)
    }
    for _ in range(150):
        start = draw.randrange(end)
        stop = min(start + draw.choice([1, 30, BLOCK, 4096, 9000]), end)
        noise = draw.choice([draw.randbytes, bytes])(stop - start)
        shard.write_bytes(whole[:start] + noise + whole[stop:])
        found = index_shard(shard)
        untouched = {k for k, at in span.items() if stop <= at.start or at.stop <= start}
        assert untouched <= set(found.keys())
        for index in range(len(found)):
            for part in found.record(index).parts.values():
                assert part.offset >= 0 and part.offset + part.size <= len(whole)
    assert time.monotonic() - started < 60


# ---- the file beside the shard -------------------------------------------------------------------


def test_an_index_comes_back_as_it_was(shard):
    overwrite(shard, members(shard)[12].offset, bytes(BLOCK))
    made = index_shard(shard)
    assert made.faults
    save_table(made, index_path(shard))
    assert said(load_table(shard, index_path(shard))) == said(made)


def test_an_index_that_moves_with_its_shard_names_the_new_place(shard, tmp_path):
    overwrite(shard, members(shard)[12].offset, bytes(BLOCK))
    before = indexed(shard)
    new = tmp_path / "elsewhere"
    new.mkdir()
    for path in (shard, index_path(shard)):
        path.rename(new / path.name)
    after = load_table(new / shard.name, index_path(new / shard.name))
    assert [str(f) for f in after.faults] == [
        str(f).replace(str(shard), str(new / shard.name)) for f in before.faults
    ]


def test_any_flipped_bit_of_an_index_is_noticed(tmp_path):
    path = tmp_path / "a.tar"
    written = write_shard(path, [make_sample(0), make_sample(1)], made={"vae": "sha256:0"})
    whole = index_path(path).read_bytes()
    for place in range(len(whole)):
        for bit in (0, 3, 7):
            data = bytearray(whole)
            data[place] ^= 1 << bit
            index_path(path).write_bytes(data)
            loaded = load_table(path, index_path(path))
            assert loaded is None or said(loaded) == said(written), place


@pytest.mark.parametrize("length", [0, 7, 100, -1])
def test_a_cut_index_is_made_again(shard, length):
    before = said(indexed(shard))
    index_path(shard).write_bytes(index_path(shard).read_bytes()[:length])
    assert load_table(shard, index_path(shard)) is None
    assert said(indexed(shard)) == before
    assert load_table(shard, index_path(shard)) is not None


def test_an_index_of_another_format_is_made_again(shard, monkeypatch):
    monkeypatch.setattr(table, "FORMAT", FORMAT + 1)
    indexed(shard)
    monkeypatch.undo()
    assert load_table(shard, index_path(shard)) is None


def test_an_index_is_made_once(shard, monkeypatch):
    first = indexed(shard)
    monkeypatch.setattr(catalog, "index_shard", lambda path: pytest.fail("scanned again"))
    assert said(indexed(shard)) == said(first)


def test_a_shard_that_changed_is_indexed_again(shard):
    assert len(indexed(shard)) == 6
    write_shard(shard, (make_sample(i) for i in range(3)))
    index_path(shard).unlink()
    assert len(indexed(shard)) == 3  # other bytes
    overwrite(shard, members(shard)[0].offset, bytes(BLOCK))
    os.utime(shard, ns=(0, 0))
    assert len(indexed(shard)) == 2  # another time


def test_a_prepared_shard_may_be_copied_and_touched(tmp_path, monkeypatch):
    write_shard(tmp_path / "a.tar", [make_sample(0)], made={"vae": "sha256:0"})
    os.utime(tmp_path / "a.tar", ns=(0, 0))
    monkeypatch.setattr(catalog, "index_shard", lambda path: pytest.fail("scanned again"))
    assert indexed(tmp_path / "a.tar").made == {"vae": "sha256:0"}


def test_of_a_cut_prepared_shard_it_is_known_how_much_is_lost(tmp_path):
    path = tmp_path / "a.tar"
    written = write_shard(path, (make_sample(i) for i in range(6)), made={"vae": "sha256:0"})
    whole = path.read_bytes()
    path.write_bytes(whole[: members(path)[12].offset])
    found = indexed(path)
    assert (found.keys(), found.made) == (["000000", "000001"], written.made)
    (fault,) = found.faults
    assert (fault.reason, fault.count) == ("shard is cut off", 4)
    assert f"written with {len(whole)}" in fault.detail
    assert [r.parts[".png"].crc for r in map(found.record, range(2))] == [
        r.parts[".png"].crc for r in map(written.record, range(2))
    ]
    path.write_bytes(whole + b"more")
    found = indexed(path)
    assert (len(found), found.faults[0].reason) == (6, "shard changed since it was indexed")
    path.write_bytes(b"")
    assert (len(indexed(path)), indexed(path).faults[0].count) == (0, 6)


def test_a_cut_shard_of_no_samples_is_a_fault(tmp_path):
    write_shard(tmp_path / "a.tar", [])
    (tmp_path / "a.tar").write_bytes(b"")
    assert [f.reason for f in indexed(tmp_path / "a.tar").faults] == ["shard is cut off"]


def test_the_index_of_a_folder_that_cannot_be_written_goes_to_the_cache(shard, cache, monkeypatch):
    index_path(shard).mkdir()  # so that no file can have this name
    before = sorted(shard.parent.iterdir())
    found = indexed(shard)
    assert cached_index_path(shard).is_file() and cached_index_path(shard).is_relative_to(cache)
    assert sorted(shard.parent.iterdir()) == before  # nothing is left of the attempt
    monkeypatch.setattr(catalog, "index_shard", lambda path: pytest.fail("scanned again"))
    assert said(indexed(shard)) == said(found)


def test_without_any_place_for_an_index_everything_still_works(shard, tmp_path, monkeypatch):
    index_path(shard).mkdir()
    (tmp_path / "file").touch()
    monkeypatch.setenv("ASYMLIFT_CACHE", str(tmp_path / "file"))
    assert len(indexed(shard)) == 6


def test_the_cache_is_where_the_system_says(shard, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", "/var/x")
    monkeypatch.delenv("ASYMLIFT_CACHE")
    assert cached_index_path(shard).parent == Path("/var/x/asymlift/index")
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert cached_index_path(shard).parent == Path.home() / ".cache/asymlift/index"


def test_many_may_index_one_shard_at_once(shard):
    found, start = [], threading.Barrier(8)

    def index() -> None:
        start.wait()
        for _ in range(10):
            index_path(shard).unlink(missing_ok=True)
            found.append(said(indexed(shard)))

    threads = [threading.Thread(target=index) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(found) == 80 and all(one == found[0] for one in found)
    assert sorted(path.name for path in shard.parent.iterdir())[-1] == shard.name
    assert len(list(shard.parent.iterdir())) <= 2


def test_others_may_read_an_index(shard):
    indexed(shard)
    mask = os.umask(0)
    os.umask(mask)
    assert index_path(shard).stat().st_mode & 0o777 == 0o666 & ~mask


def test_an_index_takes_about_150_bytes_a_sample(tmp_path):
    samples = [dataclasses.replace(make_sample(0), key=f"{n:08d}") for n in range(300)]
    made = write_shard(tmp_path / "a.tar", samples)
    columns = [*made.spans.values(), *made.crcs.values(), made.ends, made.sizes]
    assert (sum(column.nbytes for column in columns) + len(made.blob)) / len(made) < 150
    assert made.has(".png").all() and not made.has(".webp").any()
    assert np.issubdtype(made.has(".webp").dtype, np.bool_)


def test_a_flipped_byte_in_the_data_is_seen_when_it_is_read(tmp_path):
    made = write_shard(tmp_path / "a.tar", [make_sample(0)])
    record = made.record(0)
    flip(tmp_path / "a.tar", record.parts[".png"].offset)
    with pytest.raises(BadSample, match="changed since it was indexed"):
        Reader().image(record)


@pytest.mark.parametrize(
    ("column", "value"),
    [("spans", (0, 1 << 40)), ("spans", (1 << 62, 5)), ("spans", (512, -5)), ("ends", 1 << 40)],
)
def test_an_index_whose_columns_cannot_be_is_none(tmp_path, column, value):
    """Under a right checksum: whoever writes a shard may write its index too."""
    shard = raw_tar(tmp_path / "a.tar", [("a.png", PNG)])
    found, path = index_shard(shard), table.index_path(shard)
    table.save_table(found, path)
    assert table.load_table(shard, path) is not None
    if column == "spans":
        found.spans[".png"][:] = value
    else:
        found.ends[:] = value
    table.save_table(found, path)
    assert table.load_table(shard, path) is None
