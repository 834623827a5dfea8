import io
import random
import sys
import tarfile
import threading
import time
from pathlib import Path

import numpy as np
import pytest
import torch

from asymlift.data.buckets import Fit
from asymlift.data.catalog import Catalog, indexed
from asymlift.data.feed import StepSamples
from asymlift.data.reader import Reader
from asymlift.data.records import BadSample, Sample
from asymlift.data.stream import Stream, Streamed, StreamFeed, expand_urls, opened, shown
from asymlift.data.table import index_shard
from asymlift.data.writer import write_shard
from asymlift.errors import BadData, Unavailable
from tests.data.small_shards import PNG, overwrite, raw_tar
from tests.reliability import difficult

FIT = Fit(sides=(32,), patch=8)


def samples(start, count, size=(32, 32)):
    for index in range(start, start + count):
        image = np.random.default_rng(index).integers(0, 256, (3, *size), dtype=np.uint8)
        yield Sample(f"{index:04d}", torch.from_numpy(image), f"caption {index}")


@pytest.fixture
def shards(tmp_path):
    """Four shards of ten samples of two sizes."""
    paths = [tmp_path / f"{number}.tar" for number in range(4)]
    for number, path in enumerate(paths):
        size = (32, 32) if number % 2 else (24, 40)
        write_shard(path, samples(10 * number, 10, size))
    return [str(path) for path in paths]


def feed(urls, *, rank=0, world=1, first_step=0, seed=0, workers=0, micro_batch=2, **options):
    def stream(on_bad):
        return Stream(
            urls, FIT, rank=rank, world=world, seed=seed, first_step=first_step, on_bad=on_bad
        )

    return StreamFeed(
        stream, Reader(), micro_batch=micro_batch, accumulation=2, workers=workers, **options
    )


def keys(step: StepSamples):
    return [[sample.key for sample in micro] for micro in step.micro_batches]


def take(count, urls, **options):
    with feed(urls, **options) as open_feed:
        return [open_feed.step(number) for number in range(count)]


# ---- the sequence ------------------------------------------------------------------------------


def test_every_micro_batch_holds_one_size(shards):
    for step in take(12, shards):
        assert len(step.micro_batches) == 2
        for micro_batch, size in zip(step.micro_batches, step.sizes, strict=True):
            assert {tuple(sample.image.shape[1:]) for sample in micro_batch} == {size}


def test_a_pass_holds_every_sample_once(shards):
    read = [key for step in take(10, shards) for micro in keys(step) for key in micro]
    assert sorted(read) == [f"{index:04d}" for index in range(40)]


def test_the_ranks_share_the_shards(shards):
    parts = [
        {
            key
            for step in take(5, shards, rank=rank, world=2)
            for micro in keys(step)
            for key in micro
        }
        for rank in range(2)
    ]
    assert len(parts[0] | parts[1]) == 40 and not parts[0] & parts[1]


def test_threads_change_nothing(shards):
    first, *others = [list(map(keys, take(15, shards, workers=n))) for n in (0, 1, 3)]
    assert all(other == first for other in others)


def test_seed_and_first_step_change_the_order_and_passes_differ(shards):
    orders = [
        list(map(keys, take(20, shards, **how))) for how in ({}, {"seed": 1}, {"first_step": 5})
    ]
    assert orders[0] != orders[1] and orders[0] != orders[2]
    assert orders[0][:10] != orders[0][10:]


def test_passes_are_counted_as_epochs(shards):
    assert {step.epoch for step in take(30, shards)} == {0, 1, 2}


def test_there_must_be_a_shard_for_every_rank(shards):
    with pytest.raises(BadData, match="a shard for every rank: 4 for 5 ranks"):
        feed(shards, world=5)


# ---- what is broken ----------------------------------------------------------------------------


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    return difficult.make_shards(tmp_path_factory.mktemp("difficult"), plain=100, size=(32, 48))


def test_a_stream_finds_what_an_index_finds(corpus):
    for path in corpus.paths:
        if not Path(path).is_file():
            continue
        faults: list[BadSample] = []
        with opened(str(path)) as stream:
            streamed = {record.key for record in Streamed(str(path), faults.append).records(stream)}
        table = indexed(Path(path))
        repeated = {f.where.rpartition("!")[2] for f in faults if f.reason == "duplicate key"}
        assert streamed - repeated == set(table.keys()), path
        assert {f.reason for f in faults} == {f.reason for f in table.faults}, path


def by_index_and_stream(path: Path) -> list[tuple[set[str], set[tuple[str, str]]]]:
    """(keys, what is wrong with which sample), found in both ways."""
    faults: list[BadSample] = []
    with opened(str(path)) as stream:
        keys = {record.key for record in Streamed(str(path), faults.append).records(stream)}
    table = index_shard(path)
    return [
        (set(table.keys()), {(f.where, f.reason) for f in table.faults}),
        (keys, {(f.where, f.reason) for f in faults}),
    ]


@pytest.mark.parametrize(
    "name", ["../x.png", "../../etc/x.tar.png", "a.b/c.png", ".hidden", "plain", "x\x1b.png"]
)
def test_names_mean_the_same_in_a_stream_and_in_an_index(tmp_path, name):
    members = [("a.png", PNG), (name, PNG), ("z.png", PNG)]
    one, other = by_index_and_stream(raw_tar(tmp_path / "a.tar", members))
    assert one == other
    assert one[0] == {"a", "z"} and len(one[1]) == 1


@pytest.mark.parametrize(
    ("before", "after", "kept"),
    [
        # what stands on either side of damage, where others have .json, .png and .txt
        ("json png txt", "json png txt", {"before", "after"}),
        ("png txt", "json png txt", {"before", "after"}),  # a .json would stand in front
        ("json png txt", "json png", {"before", "after"}),  # a .txt would stand behind
        ("json png", "json png txt", {"after"}),
        ("json png txt", "png txt", {"before"}),
        ("json png txt", "json txt", {"before", "after"}),  # its .png would stand between
        ("png", "txt", set()),
    ],
)
def test_beside_damage_a_sample_is_lost_that_may_have_held_more(tmp_path, before, after, kept):
    def sample(key, suffixes):
        return [(f"{key}.{s}", PNG if s == "png" else b"{}") for s in suffixes.split()]

    whole = [m for n in range(5) for m in sample(f"{n}", "json png txt")]
    members = [*whole, *sample("before", before), ("x.txt", b"x"), *sample("after", after)]
    path = raw_tar(tmp_path / "a.tar", members)
    with tarfile.open(path) as tar:
        overwrite(path, tar.getmember("x.txt").offset, bytes(512))
    for keys, faults in by_index_and_stream(path):
        assert keys == {*map(str, range(5)), *kept}
        assert len(faults) == 1 + 2 - len(kept)
        assert {reason for _, reason in faults} == {"shard is damaged"}


def test_what_is_read_from_a_stream_is_what_is_read_by_position(corpus):
    path = next(Path(p) for p in corpus.paths if Path(p).is_file())
    catalog = Catalog([indexed(path)], FIT)
    with opened(str(path)) as stream:
        streamed = {record.key: record for record in Streamed("x", lambda _: None).records(stream)}
    for record in catalog:
        mine = streamed[record.key]
        assert {s: part.inline for s, part in mine.parts.items()} == {
            s: Reader().bytes_of(record, s) for s in record.parts
        }
        if mine.width:  # an index believes the facts, a stream only the picture
            assert (mine.width, mine.height) == (record.width, record.height)


def test_bad_samples_are_named_and_the_rest_is_trained_on(shards, tmp_path):
    bad = tmp_path / "bad.tar"
    bad.write_bytes(Path(shards[0]).read_bytes()[:9000])
    steps = take(10, [*shards[1:], str(bad), str(tmp_path / "none.tar")])
    reasons = {fault.reason for step in steps for fault in step.faults}
    assert reasons >= {"shard is cut off", "shard cannot be read"}
    assert all(len(micro) == 2 for step in steps for micro in keys(step))


def test_shards_without_a_usable_sample_end_the_run(tmp_path):
    (tmp_path / "a.tar").write_bytes(b"no tar")
    with pytest.raises(BadData, match="no usable sample in 1 shards"):
        take(1, [str(tmp_path / "a.tar")])


@pytest.mark.parametrize("gone", ["none.tar", "cut.tar", "pipe:false it"])
def test_a_lost_shard_weighs_as_much_as_the_others_hold(shards, tmp_path, gone):
    (tmp_path / "cut.tar").write_bytes(Path(shards[0]).read_bytes()[:300])
    faults: list[BadSample] = []
    stream = Stream(["x"], FIT, rank=0, world=1, seed=0, first_step=0, on_bad=faults.append)
    for url in [*shards, gone if gone.startswith("pipe:") else str(tmp_path / gone)]:
        assert len(list(stream.shard(url))) in (0, 10)
    assert faults[0].count == 10


def test_samples_that_are_all_bad_are_told_all_the_same(tmp_path, monkeypatch):
    """Or they would wait for a step that never comes."""
    monkeypatch.setattr("asymlift.data.stream.MOST_UNTOLD", 7)
    members = [(f"{n}.png", PNG[:45]) for n in range(5)]
    with feed([str(raw_tar(tmp_path / "a.tar", members))]) as open_feed:
        for _ in range(3):
            step = open_feed.step(0)
            assert step.micro_batches == [[None] * 2] * 2 and len(step.sizes) == 2
            assert len(step.faults) > 1
            assert {fault.reason for fault in step.faults} == {"image cannot be decoded"}


def test_pictures_of_unusable_size_are_told_once_and_not_counted_as_bad(tmp_path):
    told: list[str] = []
    write_shard(tmp_path / "a.tar", [*samples(0, 5, (16, 16)), *samples(5, 8)])
    bad: list[BadSample] = []
    stream = Stream(
        [str(tmp_path / "a.tar")], FIT, rank=0, world=1, seed=0, first_step=0,
        on_bad=bad.append, on_note=told.append,
    )  # fmt: skip
    records = stream.records()
    assert len({next(records)[1].key for _ in range(8)}) == 8
    assert not bad and stream.refused == {"too small": 5}
    assert len(told) == 1 and "too small" in told[0]


def test_a_stream_that_brings_nothing_is_named_and_given_up(monkeypatch, shards):
    monkeypatch.setattr("asymlift.data.stream.SLOW", 0.05)
    told: list[str] = []
    waits = f"pipe:{sys.executable} -c 'import time; time.sleep(3)'"
    with (
        feed([waits], patience=0.3, on_slow=told.append) as open_feed,
        pytest.raises(BadData, match=r"brought nothing for 0\.3 s"),
    ):
        open_feed.step(0)
    assert told and "of waiting" in told[0]


def test_a_member_larger_than_memory_allows_is_refused(tmp_path, monkeypatch):
    write_shard(tmp_path / "a.tar", samples(0, 2))
    monkeypatch.setattr("asymlift.data.table.MOST_BYTES", 1000)
    faults: list[BadSample] = []
    with opened(str(tmp_path / "a.tar")) as stream:
        assert not list(Streamed("a", faults.append).records(stream))
    assert [fault.reason for fault in faults] == ["member is too large"] * 2


def test_closing_ends_the_thread(shards):
    with feed(shards) as open_feed:
        open_feed.step(0)
    assert not open_feed.thread.is_alive() and threading.main_thread().is_alive()


def test_the_buffer_is_bounded_in_bytes(monkeypatch, shards):
    monkeypatch.setattr("asymlift.data.stream.BUFFER_BYTES", 1)
    stream = Stream(shards, FIT, rank=0, world=1, seed=0, first_step=0, on_bad=lambda _: None)
    buffer_sizes = []
    draw_from = stream.draw_from
    stream.draw_from = lambda buffer, draw: (
        buffer_sizes.append(len(buffer)) or draw_from(buffer, draw)
    )
    records = stream.records()
    assert len({next(records)[1].key for _ in range(40)}) == 40
    assert max(buffer_sizes) == 2


# ---- where it comes from -----------------------------------------------------------------------


def test_commands_and_file_systems(shards):
    expected = Path(shards[0]).read_bytes()
    for url in (shards[0], f"pipe:cat {shards[0]}", f"file://{shards[0]}"):
        with opened(url) as stream:
            assert stream.read() == expected


def test_a_command_that_fails_is_a_fault(shards):
    steps = take(3, [*shards, f"pipe:cat {shards[0]}; exit 3", "pipe:false now"])
    said = {str(fault) for step in steps for fault in step.faults}
    later = take(12, [*shards, f"pipe:cat {shards[0]}; exit 3", "pipe:false now"])
    said |= {str(fault) for step in later for fault in step.faults}
    assert "pipe:false ... now: command failed (exit 1)" in said
    assert any(text.endswith("command failed (exit 3)") for text in said)


def test_a_scheme_without_its_package_says_what_to_install():
    with (
        pytest.raises(Unavailable, match=r"nosuch://.*install fsspec's package"),
        opened("nosuch://a/b.tar"),
    ):
        pass


class Store:
    """A client with errors of its own, which tell secrets."""

    def __init__(self, *, opens: bool) -> None:
        self.opens = opens

    def __enter__(self):
        if not self.opens:
            raise LookupError("token=secret")
        return self

    def __exit__(self, *error):
        pass

    def read(self, count):
        raise FileNotFoundError("https://x/a.tar?token=secret")


@pytest.mark.parametrize(("opens", "said"), [(False, "LookupError"), (True, "FileNotFoundError")])
def test_what_the_client_of_a_store_raises_costs_the_shard(monkeypatch, opens, said):
    monkeypatch.setattr("fsspec.open", lambda url, mode: Store(opens=opens))
    faults: list[BadSample] = []
    stream = Stream(["x"], FIT, rank=0, world=1, seed=0, first_step=0, on_bad=faults.append)
    assert list(stream.shard("s3://b/a.tar")) == []
    assert [str(fault) for fault in faults] == [f"s3://b/a.tar: shard cannot be read ({said})"]


def test_secrets_do_not_show():
    assert shown("s3://user:secret@bucket/a.tar?token=secret") == "s3://bucket/a.tar"
    assert (
        shown("pipe:curl -H 'Authorization: secret' https://x/y/000.tar") == "pipe:curl ... 000.tar"
    )
    assert shown("pipe:x") == "pipe:x"
    assert shown("/a/b.tar") == "/a/b.tar"


def test_patterns_stand_for_many():
    assert expand_urls("s3://b/{00..02}.tar") == ["s3://b/00.tar", "s3://b/01.tar", "s3://b/02.tar"]
    assert expand_urls(["a.tar", "pipe:cat {b,c}.tar"]) == [
        "a.tar",
        "pipe:cat b.tar",
        "pipe:cat c.tar",
    ]
    with pytest.raises(BadData, match="listed twice"):
        expand_urls(["a.tar", "a.tar"])
    with pytest.raises(BadData, match="names no shards"):
        expand_urls([])


def test_random_bytes_neither_crash_nor_hang():
    draw = random.Random(0)
    path_bytes = io.BytesIO()
    with tarfile.open(fileobj=path_bytes, mode="w") as tar:
        for index in range(20):
            member = tarfile.TarInfo(f"{index:03d}.txt")
            member.size = 700
            tar.addfile(member, io.BytesIO(b"x" * 700))
    whole = path_bytes.getvalue()
    started = time.monotonic()
    for _ in range(200):
        data = bytearray(whole)
        for _ in range(draw.randint(1, 5)):
            start = draw.randrange(len(data))
            data[start : start + draw.choice([1, 100, 2000])] = draw.randbytes(
                draw.choice([1, 100])
            )
        list(
            Streamed("x", lambda _: None).records(
                io.BytesIO(bytes(data[: draw.randrange(len(data))]))
            )
        )
    assert time.monotonic() - started < 20
