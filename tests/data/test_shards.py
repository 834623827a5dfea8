"""A shard is read whole or refused by name: nothing is lost without a word."""

import io
import json
import os
import random
import tarfile
import threading
from contextlib import suppress
from pathlib import Path

import pytest
import torch
from safetensors.torch import load, save

from asymlift.data.pictures import decode_image, encode_png
from asymlift.data.shards import (
    BadSample,
    Sample,
    ShardReader,
    expand,
    index_shard,
    index_shards,
    pack,
    write_shard,
)
from asymlift.errors import BadData

BLOCK = 512


def make_sample(index: int, size: int = 16) -> Sample:
    draw = torch.Generator().manual_seed(index)
    return Sample(
        f"{index:06d}",
        torch.randint(0, 256, (3, size, size + 8), dtype=torch.uint8, generator=draw),
        f"caption {index}",
        {"source": "test"},
        torch.randn(4, 4, 6, generator=draw),
        {"hidden": torch.randn(3, 5, generator=draw).bfloat16()},
    )


@pytest.fixture
def shard(tmp_path: Path) -> Path:
    write_shard(tmp_path / "000000.tar", (make_sample(i) for i in range(6)))
    return tmp_path / "000000.tar"


def raw_tar(path: Path, members: list[tuple[str, bytes]], kind: int = tarfile.USTAR_FORMAT) -> Path:
    with tarfile.open(path, "w", format=kind) as tar:
        for name, data in members:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return path


PNG = encode_png(torch.zeros(3, 8, 8, dtype=torch.uint8))

# ---- what is written comes back ------------------------------------------------------------


def test_a_sample_comes_back_exactly(shard):
    reader = ShardReader()
    for number, index in enumerate(index_shard(shard).samples):
        made, read = make_sample(number), reader.read(index)
        assert (read.key, read.caption) == (made.key, made.caption)
        assert read.facts == {"source": "test", "width": 24, "height": 16}
        assert (index.width, index.height) == (24, 16)
        assert torch.equal(read.image, made.image)
        assert torch.equal(read.latent, made.latent)
        assert torch.equal(read.text["hidden"], made.text["hidden"])


def test_reading_by_position_equals_webdatasets_own_reading(shard):
    os.environ["WDS_SECURE"] = "1"
    import webdataset

    reader = ShardReader()
    streamed = list(webdataset.WebDataset(str(shard), shardshuffle=False))
    indexed = index_shard(shard).samples
    assert len(streamed) == len(indexed) == 6
    for theirs, ours in zip(streamed, indexed, strict=True):
        assert theirs["__key__"] == ours.key
        assert {f".{name}" for name in theirs if not name.startswith("__")} == set(ours.members)
        for suffix in ours.members:
            assert reader.bytes_of(ours, suffix) == theirs[suffix[1:]]
        assert torch.equal(reader.image(ours), decode_image(theirs["png"]))
        assert torch.equal(reader.latent(ours), load(theirs["latent.safetensors"])["latent"])


def test_equal_samples_give_equal_bytes_at_any_time(shard, tmp_path, monkeypatch):
    monkeypatch.setattr("time.time", lambda: 2e9)
    again = tmp_path / "again.tar"
    assert write_shard(again, (make_sample(i) for i in range(6))) == 6
    assert again.read_bytes() == shard.read_bytes()


def test_members_already_packed_are_stored_as_they_are(tmp_path):
    key, members = pack(make_sample(3))
    write_shard(tmp_path / "packed.tar", [(key, members)])
    write_shard(tmp_path / "sample.tar", [make_sample(3)])
    assert (tmp_path / "packed.tar").read_bytes() == (tmp_path / "sample.tar").read_bytes()


def test_a_writer_that_fails_leaves_nothing(tmp_path):
    def failing():
        yield make_sample(0)
        raise RuntimeError("disk on fire")

    with pytest.raises(RuntimeError):
        write_shard(tmp_path / "000000.tar", failing())
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("key, reason", [("a/b", "path"), ("a.b", "dot"), ("", "without key")])
def test_keys_that_would_not_come_back_are_not_written(tmp_path, key, reason):
    with pytest.raises(BadSample, match=reason):
        write_shard(tmp_path / "000000.tar", [(key, {".png": PNG})])


def test_a_key_is_written_once(tmp_path):
    with pytest.raises(BadSample, match="duplicate key"):
        write_shard(tmp_path / "000000.tar", [make_sample(0), make_sample(0)])


def test_long_names_and_pax_headers_are_understood(tmp_path):
    long = "k" * 150
    for kind in (tarfile.GNU_FORMAT, tarfile.PAX_FORMAT):
        raw_tar(tmp_path / "long.tar", [(f"{long}.png", PNG), (f"{long}.TXT", b"hello")], kind)
        (sample,) = index_shard(tmp_path / "long.tar").samples
        assert sample.key == long
        assert ShardReader().caption(sample) == "hello"


def test_the_size_comes_from_the_image_where_the_facts_do_not_tell(tmp_path):
    raw_tar(
        tmp_path / "a.tar", [("a.png", PNG), ("b.json", b"[1"), ("b.png", PNG), ("c.txt", b"x")]
    )
    sizes = {s.key: (s.width, s.height) for s in index_shard(tmp_path / "a.tar").samples}
    assert sizes == {"a": (8, 8), "b": (8, 8), "c": (0, 0)}


def test_threads_share_a_reader_over_more_shards_than_it_keeps_open(tmp_path, monkeypatch):
    monkeypatch.setattr("asymlift.data.shards.OPEN_SHARDS", 2)
    for i in range(8):
        write_shard(tmp_path / f"{i}.tar", [make_sample(i)])
    samples = [s for index in index_shards(expand(str(tmp_path / "*.tar"))) for s in index.samples]
    reader, wrong = ShardReader(), []

    def read(seed: int) -> None:
        for sample in random.Random(seed).choices(samples, k=40):
            if not torch.equal(reader.latent(sample), make_sample(int(sample.key)).latent):
                wrong.append(sample.key)

    threads = [threading.Thread(target=read, args=(seed,)) for seed in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong
    assert len(list(Path("/proc/self/fd").iterdir())) < 200


# ---- damaged archives ------------------------------------------------------------------------


def offsets(path: Path) -> list[tuple[str, int, int, int]]:
    with tarfile.open(path) as tar:
        return [(m.name, m.offset, m.offset_data, m.size) for m in tar]


def cut_at(path: Path, place: int) -> None:
    path.write_bytes(path.read_bytes()[:place])


def overwrite(path: Path, place: int, data: bytes) -> None:
    whole = bytearray(path.read_bytes())
    whole[place : place + len(data)] = data
    path.write_bytes(whole)


DAMAGE = {
    "mid data": (lambda p, m: cut_at(p, m[8][2] + 5), r"000000.tar!000001: cut off inside 000001"),
    "mid header": (lambda p, m: cut_at(p, m[8][1] + 100), r"cut off inside a header at byte"),
    "at a member": (lambda p, m: cut_at(p, m[8][1]), r"cut off, no end of archive"),
    "between samples": (lambda p, m: cut_at(p, m[10][1]), r"cut off, no end of archive"),
    "half the end": (lambda p, m: cut_at(p, end_of(m) + BLOCK), r"half of the end of archive"),
    "checksum": (lambda p, m: overwrite(p, m[8][1] + 3, b"\xff"), r"damaged header \(bad checksum"),
    "zeros": (lambda p, m: overwrite(p, m[8][1], bytes(BLOCK)), r"zeros in the middle"),
    "noise": (lambda p, m: overwrite(p, m[8][1], bytes(range(256)) * 2), r"damaged header"),
    "empty file": (lambda p, m: cut_at(p, 0), r"no tar header \(empty file\)"),
    "web page": (lambda p, m: p.write_text("<html>404</html>" * 90), r"no tar header"),
    "random": (lambda p, m: p.write_bytes(random.Random(0).randbytes(4096)), r"no tar header"),
    "negative size": (lambda p, m: negative_size(p, m[8][1]), r"impossible size"),
}


def end_of(members: list[tuple[str, int, int, int]]) -> int:
    _, _, start, size = members[-1]
    return start + -(-size // BLOCK) * BLOCK


def negative_size(path: Path, place: int) -> None:
    header = bytearray(path.read_bytes()[place : place + BLOCK])
    header[124:136] = b"\xff" * 11 + b"\x00"  # base 256
    header[148:156] = b" " * 8
    header[148:156] = b"%06o\0 " % sum(header)
    overwrite(path, place, bytes(header))


@pytest.mark.parametrize("name", DAMAGE)
def test_a_damaged_archive_is_refused_and_the_place_named(shard, name):
    damage, message = DAMAGE[name]
    damage(shard, offsets(shard))
    with pytest.raises(BadData, match=message) as caught:
        index_shard(shard, on_bad=lambda fault: None)  # never skippable
    assert "000000.tar" in str(caught.value)
    assert str(caught.value).count("\n") == 0


def test_every_cut_is_noticed(shard):
    """At whatever byte a download stops, the shard is refused."""
    whole, end = shard.read_bytes(), end_of(offsets(shard))
    for place in random.Random(0).sample(range(end + 2 * BLOCK), 150):
        shard.write_bytes(whole[:place])
        with pytest.raises(BadData):
            index_shard(shard)


def test_any_flipped_bit_in_a_header_is_noticed_or_changes_nothing(shard):
    whole = shard.read_bytes()
    headers = [offset for _, offset, _, _ in offsets(shard)]
    good = index_shard(shard).samples
    draw = random.Random(0)
    for _ in range(150):
        data = bytearray(whole)
        data[draw.choice(headers) + draw.randrange(BLOCK)] ^= 1 << draw.randrange(8)
        shard.write_bytes(data)
        with suppress(BadData):
            assert index_shard(shard).samples == good  # the checksum's own padding


# ---- samples that are wrong in themselves ----------------------------------------------------


def linked(path: Path, kind: bytes) -> None:
    with tarfile.open(path, "w", format=tarfile.USTAR_FORMAT) as tar:
        info = tarfile.TarInfo("good.png")
        info.size = len(PNG)
        tar.addfile(info, io.BytesIO(PNG))
        link = tarfile.TarInfo("bad.png")
        link.type, link.linkname = kind, "/etc/passwd"
        tar.addfile(link)


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


@pytest.mark.parametrize("reason", FAULTS)
def test_a_wrong_sample_is_named_or_left_out_and_reported(tmp_path, reason):
    path = raw_tar(tmp_path / "a.tar", FAULTS[reason])
    with pytest.raises(BadSample, match=r"a\.tar!.*: " + reason):
        index_shard(path)
    told: list[BadSample] = []
    assert [s.key for s in index_shard(path, on_bad=told.append).samples] == ["good"]
    assert [fault.reason for fault in told] == [reason]


@pytest.mark.parametrize("name", ["/etc/bad.png", "./bad.png", "a/bad.png", "..\\bad.png"])
def test_no_path_becomes_a_key(tmp_path, name):
    with pytest.raises(BadSample, match="key with a path in it"):
        index_shard(raw_tar(tmp_path / "a.tar", [(name, PNG)]))


@pytest.mark.parametrize("kind", [tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.DIRTYPE])
def test_links_and_folders_are_not_skipped_silently(tmp_path, kind):
    linked(tmp_path / "a.tar", kind)
    with pytest.raises(BadSample, match=r"a\.tar!bad: not a plain file"):
        index_shard(tmp_path / "a.tar")


def test_a_key_in_two_shards_is_refused(tmp_path):
    for name in ("a.tar", "b.tar"):
        write_shard(tmp_path / name, [make_sample(0)])
    with pytest.raises(BadSample, match=r"b\.tar!000000: duplicate key \(also in .*a\.tar\)"):
        index_shards([tmp_path / "a.tar", tmp_path / "b.tar"])
    told: list[BadSample] = []
    indexes = index_shards([tmp_path / "a.tar", tmp_path / "b.tar"], on_bad=told.append)
    assert [len(index.samples) for index in indexes] == [1, 0]
    assert len(told) == 1


LATENT, NAN = torch.zeros(4, 2, 2), torch.full((4, 2, 2), float("nan"))
BROKEN = {
    "no image": {".txt": b"x"},
    "not a JPEG, PNG or WebP image": {".png": b"<html>"},
    "image cannot be decoded": {".png": pack(make_sample(0))[1][".png"][:300]},
    "wrong size in the facts": {".png": PNG, ".json": b'{"width": 9, "height": 8}'},
    "caption is not UTF-8": {".png": PNG, ".txt": b"\xff\xfe"},
    "facts are not a JSON object": {".png": PNG, ".json": b"[]"},
    "latent is not a safetensors file": {".png": PNG, ".latent.safetensors": b"garbage!"},
    "latent has the wrong shape": {".png": PNG, ".latent.safetensors": save({"z": LATENT})},
    "latent holds NaN or infinity": {".png": PNG, ".latent.safetensors": save({"latent": NAN})},
    "text holds NaN or infinity": {".png": PNG, ".text.safetensors": save({"hidden": NAN})},
}


@pytest.mark.parametrize("reason", BROKEN)
def test_a_broken_part_is_named_when_it_is_read(tmp_path, reason):
    write_shard(tmp_path / "a.tar", [("bad", BROKEN[reason])])
    (sample,) = index_shard(tmp_path / "a.tar").samples
    with pytest.raises(BadSample) as caught:
        ShardReader().read(sample)
    assert caught.value.reason == reason
    assert caught.value.where.endswith("a.tar!bad")


def test_a_shard_that_shrank_after_indexing_is_noticed(shard):
    sample = index_shard(shard).samples[-1]
    cut_at(shard, 1000)
    with pytest.raises(BadSample, match="shard changed"):
        ShardReader().read(sample)


def test_a_huge_shape_in_a_latent_costs_no_memory(tmp_path):
    claim = {"latent": {"dtype": "F32", "shape": [2**31, 2**31, 1], "data_offsets": [0, 4]}}
    header = json.dumps(claim).encode()
    data = len(header).to_bytes(8, "little") + header + bytes(4)
    write_shard(tmp_path / "a.tar", [("bad", {".png": PNG, ".latent.safetensors": data})])
    with pytest.raises(BadSample, match="latent is not a safetensors file"):
        ShardReader().read(index_shard(tmp_path / "a.tar").samples[0])


# ---- patterns --------------------------------------------------------------------------------


def test_patterns_expand_in_order(tmp_path):
    for i in range(12):
        (tmp_path / f"{i:06d}.tar").touch()
    braces = expand(str(tmp_path / "{000000..000011}.tar"))
    assert [path.name for path in braces] == [f"{i:06d}.tar" for i in range(12)]
    assert expand(tmp_path / "*.tar") == braces
    assert expand([braces[3], str(tmp_path / "00000{0,1}.tar")]) == [braces[3], *braces[:2]]


@pytest.mark.parametrize(
    "pattern, message",
    [
        ("{0..3}.tar", r"0\.tar: there is no such shard"),
        ("*.tar", r"\*\.tar: no shard matches"),
        (".", r"there is no such shard"),
    ],
)
def test_a_missing_shard_is_named(tmp_path, pattern, message):
    with pytest.raises(BadData, match=message):
        expand(str(tmp_path / pattern))


@pytest.mark.parametrize("pattern", ["pipe:rm -rf .", "https://example.org/0.tar", "hf://x/0.tar"])
def test_nothing_is_run_or_downloaded(pattern):
    with pytest.raises(BadData, match="local files"):
        expand(pattern)


def test_a_shard_listed_twice_is_refused(shard):
    with pytest.raises(BadData, match="listed twice"):
        expand([shard, shard])
