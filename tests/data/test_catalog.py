"""One sequence of records out of shards, folders and tables; what is not in it is accounted for."""

import json
import random
import time
import tracemalloc
from pathlib import Path

import numpy as np
import pytest
import torch

from asymlift.data.buckets import Fit
from asymlift.data.catalog import Catalog, expand, indexed, listed, open_catalog
from asymlift.data.pictures import encode_picture, encode_png
from asymlift.data.reader import Reader
from asymlift.data.records import LATENT, BadSample
from asymlift.data.table import Row, index_path, save_table, table_of
from asymlift.data.writer import Packed, packed_sample, write_shard
from asymlift.errors import BadData
from tests.data.small_shards import PNG, make_sample, raw_tar
from tests.reliability.difficult import make_shards

FIT = Fit((16,), 8)


def picture(height: int, width: int) -> bytes:
    return encode_png(torch.zeros(3, height, width, dtype=torch.uint8))


def write_shards(folder: Path, count: int, each: int = 3, **made: object) -> list[Path]:
    for s in range(count):
        samples = (make_sample(s * each + i) for i in range(each))
        write_shard(folder / f"{s:06d}.tar", samples, made=made or None)
    return [folder / f"{s:06d}.tar" for s in range(count)]


def write_folder(folder: Path, names: str = "xyz") -> Path:
    folder.mkdir(parents=True)
    for name in names:
        (folder / f"{name}.png").write_bytes(picture(24, 16))
        (folder / f"{name}.txt").write_text(f"a {name}")
    return folder


def lines(catalog: Catalog) -> list[str]:
    return [str(fault) for fault in catalog.faults]


# ---- what is named -------------------------------------------------------------------------------


def test_patterns_expand_in_order(tmp_path):
    for i in range(12):
        (tmp_path / f"{i:06d}.tar").touch()
    (tmp_path / "._000000.tar").touch()  # what a Mac leaves behind
    braces = expand(str(tmp_path / "{000000..000011}.tar")).shards
    assert [path.name for path in braces] == [f"{i:06d}.tar" for i in range(12)]
    assert expand(tmp_path / "*.tar").shards == braces
    assert expand(tmp_path).shards == braces
    assert expand([braces[3], str(tmp_path / "00000{0,1}.tar")]).shards == [braces[3], *braces[:2]]


def test_folders_and_tables_are_told_from_shards(tmp_path):
    (tmp_path / "photos").mkdir()
    (shard,) = write_shards(tmp_path / "shards", 1)
    named = expand([tmp_path / "photos", tmp_path / "shards", tmp_path / "list.JSONL"])
    assert named.shards == [shard]
    assert named.listings == [tmp_path / "photos", tmp_path / "list.JSONL"]


@pytest.mark.parametrize("name", ["photos [2020]", "a{b,c}", "what?*"])
def test_what_exists_under_its_very_name_is_meant(tmp_path, name):
    (tmp_path / name).mkdir()
    assert expand(tmp_path / name).listings == [tmp_path / name]
    assert expand(str(tmp_path / name)).listings == [tmp_path / name]


@pytest.mark.parametrize(
    ("pattern", "message"),
    [
        ("photos", r"photos: there is no such file or folder; is the path or range right\?"),
        ("{0..3}.tar", r"0\.tar: there is no such shard; is the path or range right\?"),
        ("*.tar", r"\*\.tar: no shard matches this pattern"),
        ("{a", r"\{a: "),
    ],
)
def test_what_is_not_there_is_named(tmp_path, pattern, message):
    with pytest.raises(BadData, match=message):
        expand(str(tmp_path / pattern))


@pytest.mark.parametrize("pattern", ["pipe:rm -rf .", "https://example.org/0.tar", "hf://x/0.tar"])
def test_nothing_is_run_or_downloaded(pattern):
    with pytest.raises(BadData, match=r"in any order; .* data\.mode: stream, .* as files"):
        expand(pattern)


@pytest.mark.parametrize("what", ["shards/000000.tar", "photos"])
def test_the_same_twice_is_refused(tmp_path, what):
    write_shards(tmp_path / "shards", 1)
    write_folder(tmp_path / "photos")
    with pytest.raises(BadData, match=f"{what}: this is listed twice"):
        expand([tmp_path / what, tmp_path / what])


# ---- what is in it -------------------------------------------------------------------------------


@pytest.mark.parametrize("workers", [0, 3])
def test_shards_folders_and_tables_make_one_sequence(tmp_path, workers):
    write_shards(tmp_path / "shards", 2)
    write_folder(tmp_path / "photos")
    (tmp_path / "jpeg.jpg").write_bytes(encode_picture(torch.zeros(3, 16, 16).byte(), "jpeg"))
    row = {"file_name": "jpeg.jpg", "text": "from a table"}
    (tmp_path / "list.jsonl").write_text(json.dumps(row))

    ticks: list[int] = []
    names = [tmp_path / "shards", tmp_path / "photos", tmp_path / "list.jsonl"]
    catalog = open_catalog(names, FIT, workers=workers, on_done=ticks.append)

    assert sum(ticks) == 2
    assert (len(catalog), catalog.num_listed, catalog.num_lost) == (10, 10, 0)
    assert (catalog.faults, catalog.refused, catalog.made) == ([], [], None)
    assert [record.key for record in catalog] == list(catalog.keys())
    assert list(catalog.keys())[:7] == [*(f"{i:06d}" for i in range(6)), "x"]
    reader = Reader()
    samples = [reader.read(record) for record in catalog]
    assert [s.caption for s in samples[5:]] == ["caption 5", "a x", "a y", "a z", "from a table"]
    for index, sample in enumerate(samples):
        assert tuple(sample.image.shape[1:]) == tuple(catalog.targets[index])
    assert catalog.has(LATENT).tolist() == [True] * 6 + [False] * 4


def test_it_is_a_sequence(tmp_path):
    write_shards(tmp_path, 2)
    catalog = open_catalog(tmp_path, FIT)
    assert catalog[-1] == catalog[5] == catalog[np.int64(5)]
    assert catalog[1:5:2] == [catalog[1], catalog[3]]
    with pytest.raises(IndexError):
        catalog[6]


def test_targets_are_buckets_but_what_has_a_latent_keeps_its_size(tmp_path):
    raw_tar(tmp_path / "a.tar", [("plain.png", picture(41, 30)), ("wide.png", picture(17, 34))])
    cached = packed_sample(make_sample(0, size=41)).members
    write_shard(tmp_path / "b.tar", [Packed("cached", cached, 49, 41)])
    write_shard(tmp_path / "c.tar", [Packed("made", {".png": picture(41, 33)}, 33, 41)],
                made={"vae": "x"})  # fmt: skip
    write_folder(tmp_path / "photos", "p")
    catalog = open_catalog([*sorted(tmp_path.glob("*.tar")), tmp_path / "photos"], FIT)
    targets = dict(zip(catalog.keys(), map(tuple, catalog.targets.tolist()), strict=True))
    assert targets["cached"] == (40, 48)
    assert targets["made"] == (40, 32)
    for key in ("plain", "wide", "p"):
        assert targets[key][0] * targets[key][1] <= 16 * 16
    assert {catalog[i].target for i in range(5)} == set(targets.values())


def test_targets_are_those_of_each_picture_alone(tmp_path):
    """Sizes are looked up together; one by one gives the same."""
    draw = random.Random(0)
    rows = [
        Row(f"{n:04d}", {".png": (0, 1)}, draw.randrange(4, 60), draw.randrange(4, 60))
        for n in range(300)
    ]
    together = Catalog([table_of(tmp_path / "a.tar", rows, [], {})], FIT)
    alone = [Catalog([table_of(tmp_path / "a.tar", [row], [], {})], FIT) for row in rows]
    assert together.targets.tolist() == [t for one in alone for t in one.targets.tolist()]
    assert [str(f) for f in together.refused] == [str(f) for one in alone for f in one.refused]
    assert len(together) + len(together.refused) == 300


def test_the_digest_is_of_keys_order_and_sizes(tmp_path):
    first, second = write_shards(tmp_path, 2)
    digest = open_catalog([first, second], FIT).digest()
    assert digest.startswith("sha256:")
    assert digest == open_catalog(tmp_path, FIT).digest()
    assert digest != open_catalog([second, first], FIT).digest()
    assert digest != open_catalog([first], FIT).digest()
    assert digest != open_catalog(tmp_path, Fit((16,), 16)).digest()


def test_the_lowest_hashes_depend_on_keys_alone(tmp_path):
    first, second = write_shards(tmp_path, 2)
    catalog = open_catalog(tmp_path, FIT)
    chosen = [record.key for record in catalog.lowest_hashes(4)]
    assert chosen == [r.key for r in open_catalog([second, first], FIT).lowest_hashes(4)]
    assert chosen[:2] == [record.key for record in catalog.lowest_hashes(2)]
    assert len(catalog.lowest_hashes(99)) == 6


# ---- what is not in it ---------------------------------------------------------------------------


def test_the_first_of_several_samples_with_a_key_counts(tmp_path):
    (tmp_path / "b").mkdir()
    write_shard(tmp_path / "a.tar", [make_sample(0), make_sample(1)])
    write_shard(tmp_path / "b.tar", [make_sample(1), make_sample(2)])
    (tmp_path / "b" / "000002.png").write_bytes(picture(16, 16))
    names = [tmp_path / "a.tar", tmp_path / "b.tar", tmp_path / "b"]
    catalog = open_catalog(names, FIT)
    assert [r.where for r in catalog] == [
        f"{tmp_path}/a.tar!000000",
        f"{tmp_path}/a.tar!000001",
        f"{tmp_path}/b.tar!000002",
    ]
    assert lines(catalog) == [
        f"{tmp_path}/b.tar!000001: duplicate key (also in {tmp_path}/a.tar)",
        f"{tmp_path}/b/000002.png: duplicate key (also in {tmp_path}/b.tar)",
    ]
    turned = open_catalog(names[::-1], FIT)  # pictures always come after shards
    assert [r.where for r in turned][:2] == [
        f"{tmp_path}/b.tar!{key}" for key in ("000001", "000002")
    ]


def test_a_sample_that_is_left_out_is_no_duplicate(tmp_path):
    raw_tar(tmp_path / "a.tar", [("one.png", picture(9, 9))])
    raw_tar(tmp_path / "b.tar", [("one.png", picture(16, 16))])
    catalog = open_catalog([tmp_path / "a.tar", tmp_path / "b.tar"], FIT)
    assert ([r.where for r in catalog], catalog.faults) == ([f"{tmp_path}/b.tar!one"], [])


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (None, "shard is missing"),
        (b"", "not a tar"),
        (b"<html>404</html>" * 90, "not a tar"),
        (random.Random(0).randbytes(20_000), "not a tar"),
    ],
)
def test_a_lost_shard_weighs_as_much_as_the_others_hold(tmp_path, content, reason):
    (tmp_path / "a!b").mkdir()  # the mark between shard and key may be in a path
    write_shards(tmp_path / "a!b", 3)
    lost = tmp_path / "a!b" / "000001.tar"
    index_path(lost).unlink()
    lost.unlink() if content is None else lost.write_bytes(content)
    catalog = open_catalog(str(tmp_path / "a!b" / "{000000..000002}.tar"), FIT)
    assert (len(catalog), catalog.num_lost, catalog.num_listed) == (6, 3, 9)
    assert lines(catalog)[0].startswith(f"{lost}: {reason}")


def test_a_shard_in_which_every_sample_is_wrong_weighs_as_many_as_it_has(tmp_path):
    write_shards(tmp_path, 1)
    raw_tar(tmp_path / "000001.tar", [("a/b.png", PNG), ("a/c.png", PNG)])
    assert open_catalog(tmp_path, FIT).num_lost == 2


def test_a_cut_prepared_shard_weighs_what_is_lost(tmp_path):
    (path,) = write_shards(tmp_path, 1, each=8, vae="x")
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    catalog = open_catalog(path, FIT)
    assert 0 < len(catalog) < 8
    assert (len(catalog) + catalog.num_lost, catalog.num_listed) == (8, 8)


def test_bad_pictures_are_faults_and_small_ones_are_refused(tmp_path):
    members = [
        ("broken.png", b"<html>"),
        ("caption.txt", b"without a picture"),
        ("fine.png", picture(16, 16)),
        ("long.png", picture(8, 100)),
        ("small.png", picture(9, 9)),
    ]
    catalog = open_catalog(raw_tar(tmp_path / "a.tar", members), FIT)
    assert list(catalog.keys()) == ["fine"]
    assert lines(catalog) == [
        f"{tmp_path}/a.tar!broken: not a JPEG, PNG or WebP image",
        f"{tmp_path}/a.tar!caption: no image",
    ]
    assert [fault.reason for fault in catalog.refused] == ["too elongated", "too small"]
    assert (catalog.num_lost, catalog.num_listed) == (2, 5)


def test_a_prepared_picture_smaller_than_a_patch_is_a_fault(tmp_path):
    write_shard(tmp_path / "a.tar", [Packed("a", {".png": picture(4, 4)}, 4, 4)], made={"vae": "x"})
    catalog = open_catalog(tmp_path, FIT)
    assert lines(catalog) == [
        f"{tmp_path}/a.tar!a: smaller than one patch (4 x 4, a patch has 8 pixels)"
    ]


def test_shards_that_were_not_made_alike_are_refused(tmp_path):
    write_shard(tmp_path / "a.tar", [make_sample(0)], made={"vae": "sha256:1", "text": "x"})
    write_shard(tmp_path / "b.tar", [make_sample(1)], made={"vae": "sha256:2", "text": "x"})
    with pytest.raises(BadData) as caught:
        open_catalog(tmp_path, FIT)
    assert str(caught.value) == (
        f"{tmp_path}/b.tar was prepared with vae sha256:2,\n"
        f"{tmp_path}/a.tar with sha256:1: shards of one run must be made alike"
    )
    index_path(tmp_path / "b.tar").unlink()  # of which nobody knows what it was made with
    assert open_catalog(tmp_path, FIT).made == {"vae": "sha256:1", "text": "x"}


def test_a_picture_that_vanishes_while_it_is_measured_is_a_fault(tmp_path, monkeypatch):
    write_folder(tmp_path / "photos")

    def fail(*_: object) -> bytes:
        raise OSError("gone")

    monkeypatch.setattr("asymlift.data.catalog.head_of", fail)
    catalog = Catalog([listed(tmp_path / "photos")], FIT)
    assert [fault.reason for fault in catalog.faults] == ["image cannot be read"] * 3


def test_pictures_need_not_be_measured(tmp_path):
    write_folder(tmp_path / "photos")
    assert listed(tmp_path / "photos", measure=False).sizes.tolist() == [[0, 0]] * 3


NEEDS_A_MODEL = {
    "latent has the wrong shape",
    "latent has the wrong number of channels",
    "no text embedding",
    "text embedding does not fit",
}


def test_every_difficult_sample_is_read_as_it_must_be_or_named_with_its_reason(tmp_path):
    corpus = make_shards(tmp_path, plain=60, text={"hidden": (5, 6), "pooled": (7,)})
    fit = Fit((8, 16, 64, 1024), 8, max_aspect=1e6, upscale=True)
    catalog, reader = open_catalog(corpus.paths, fit), Reader()
    read, faults = {}, [*catalog.faults, *catalog.refused]
    for record in catalog:
        try:
            caption = reader.read(record).caption
            read[record.key] = caption, reader.stored_image(record).permute(1, 2, 0).numpy()
        except BadSample as fault:
            faults.append(fault)
    for case in corpus.cases:
        if case.verdict == "accept":
            caption, image = read[case.key]
            assert case.agrees(image) and caption == case.caption, case.kind
        elif case.reason not in NEEDS_A_MODEL:
            named = [
                f.reason for f in faults if case.key in f.where or ascii(case.key)[1:-1] in f.where
            ]
            assert case.reason in named, case.kind
    assert corpus.plain.keys() <= read.keys()
    for damage in corpus.damages:
        assert damage.intact.keys() <= read.keys(), damage.kind
        assert not damage.lost & read.keys(), damage.kind
        assert any(f.reason == damage.reason and damage.shard in f.where for f in faults)


# ---- nothing left --------------------------------------------------------------------------------


def test_nothing_but_small_pictures_says_what_would_keep_them(tmp_path):
    raw_tar(tmp_path / "a.tar", [(f"{n}.png", picture(20, 20)) for n in range(4)])
    catalog = open_catalog(tmp_path, Fit((64,), 8))
    assert not len(catalog)
    said = str(catalog.nothing_left("shards"))
    assert said.startswith(f"shards: {tmp_path}/a.tar!0: too small (20 x 20, ")
    assert "data.resize.sides: [64, 32, 16] would keep 4 of 4" in said
    assert said.count("\n") == 1


def test_nothing_but_faults_names_the_first_ones(tmp_path):
    raw_tar(tmp_path / "a.tar", [(f"{n}.png", b"<html>") for n in range(4)])
    said = str(open_catalog(tmp_path, FIT).nothing_left("shards")).splitlines()
    assert said[0] == "shards: there are no usable samples"
    assert said[1:] == [f"{tmp_path}/a.tar!{n}: not a JPEG, PNG or WebP image" for n in range(3)]


def test_a_catalog_of_nothing(tmp_path):
    empty = Catalog([], FIT)
    assert (len(empty), list(empty), empty.num_listed, empty.faults) == (0, [], 0, [])
    assert empty.has(LATENT).tolist() == [] and list(empty.keys()) == []
    assert not len(Catalog([indexed(tmp_path / "nowhere.tar")], FIT))


# ---- many ----------------------------------------------------------------------------------------


def test_a_hundred_thousand_samples_open_within_a_second(tmp_path):
    """From indexes alone: the shards are only asked for their size. 0.1 s when it was written."""
    suffixes = (".png", ".txt", ".json", LATENT, ".text.safetensors")
    for shard in range(100):
        rows = [
            Row(f"{shard:03d}{n:05d}", dict.fromkeys(suffixes, (n * 4096, 700)), 512, 256 + n % 64,
                dict.fromkeys(suffixes, n))
            for n in range(1000)
        ]  # fmt: skip
        path = tmp_path / f"{shard:06d}.tar"
        path.touch()
        facts = {"bytes": 0, "sha256": "0", "made": {"vae": "x"}}
        save_table(table_of(path, rows, [], facts), index_path(path))

    started = time.monotonic()
    catalog = open_catalog(tmp_path, Fit((512,), 16))
    seconds = time.monotonic() - started
    assert len(catalog) == 100_000
    assert seconds < 1

    tracemalloc.start()
    again = open_catalog(tmp_path, Fit((512,), 16))
    held, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert again.digest() == catalog.digest()
    assert peak < 40e6, (held, peak)


def test_a_picture_that_a_table_leaves_out_is_not_bad(tmp_path):
    for name in ("a.png", "b.png", "c.png"):
        (tmp_path / name).write_bytes(encode_png(torch.zeros(3, 32, 32, dtype=torch.uint8)))
    (tmp_path / "metadata.jsonl").write_text('{"file_name": "a.png", "text": "a"}\n')
    catalog = Catalog([listed(tmp_path)], FIT)
    assert len(catalog) == 1 and not catalog.faults
    assert [str(fault) for fault in catalog.refused] == [
        f"{tmp_path}/{name}.png: not in the metadata" for name in "bc"
    ]
