"""The difficult inputs are what they say: judged by the decoder, by tarfile and by their bytes."""

import io
import tarfile
import zlib
from collections import Counter
from itertools import combinations, pairwise
from pathlib import Path

import numpy as np
import pytest

from asymlift.data.pictures import BadPicture, decode_image
from tests.reliability.difficult import (
    ACCEPTED,
    DAMAGES,
    FOLDER_KINDS,
    KINDS,
    REASONS,
    REFUSED,
    Draw,
    Shapes,
    differ,
    encode,
    make_entry,
    make_folder,
    make_shards,
    write_tar,
    zeros_compressed,
)

TURNS = range(8)  # each of the seven EXIF orientations, each bit of a byte
TEXT = {"hidden": (5, 6), "pooled": (7,)}


def draw(turn: int) -> Draw:
    return Draw(40, 64, np.random.default_rng(turn), turn)


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    return make_shards(tmp_path_factory.mktemp("shards"), plain=60, text=TEXT)


def content(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


# ---- pictures ------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ACCEPTED)
def test_what_must_be_seen_is_what_the_decoder_sees(kind):
    for turn in TURNS:
        picture = ACCEPTED[kind](draw(turn))
        image = decode_image(picture.data).permute(1, 2, 0).numpy()
        assert differ(picture.expected, image) <= picture.tolerance, turn


@pytest.mark.parametrize("kind", REFUSED)
def test_what_must_be_refused_is_refused_by_the_decoder_for_that_reason(kind):
    reason, make = REFUSED[kind]
    for turn in TURNS:
        data = make(draw(turn)).data
        if reason == "tiny":  # no fault of the file
            assert min(decode_image(data).shape[1:]) == 1
            continue
        with pytest.raises(BadPicture) as caught:
            decode_image(data)
        assert caught.value.reason == REASONS[reason], turn


def test_no_picture_can_be_taken_for_another(corpus):
    plain = [plain.picture for plain in corpus.plain.values()]
    for one, other in combinations(plain, 2):
        assert differ(one, other) > 32
    for case in corpus.cases:
        if case.verdict == "accept":
            assert case.agrees(case.expected)
            assert not any(case.agrees(other) for other in plain)


@pytest.mark.parametrize("size", [1000, 1 << 20, 3_000_001])
def test_bombs_are_valid_to_the_last_byte(size):
    assert zlib.decompress(zeros_compressed(size)) == bytes(size)


# ---- shards --------------------------------------------------------------------------------


def test_a_seed_always_makes_the_same_bytes(tmp_path):
    made = []
    for name, seed in (("a", 1), ("b", 1), ("c", 2)):
        make_shards(tmp_path / name, plain=30, text=TEXT, seed=seed)
        make_folder(tmp_path / name / "loose", plain=5, seed=seed)
        loose = content(tmp_path / name / "loose")
        made.append({p.name: p.read_bytes() for p in (tmp_path / name).glob("*.tar")} | loose)
    assert made[0] == made[1] != made[2]


def test_every_kind_is_there_and_says_its_reason(corpus):
    assert Counter(case.kind for case in corpus.cases) == Counter(KINDS)
    assert [damage.kind for damage in corpus.damages] == [*DAMAGES]
    said = {case.reason for case in corpus.cases} | {d.reason for d in corpus.damages}
    said |= {case.reason_in_prepare for case in corpus.cases}
    assert said == {"", *REASONS.values()}


def test_without_latents_and_text_their_kinds_are_left_out(tmp_path):
    corpus = make_shards(tmp_path, difficult=200, plain=9, latent=None, damages=False)
    assert not any("latent" in case.kind or "text" in case.reason for case in corpus.cases)
    assert len(corpus.cases) == 200
    assert [path for path in corpus.paths if not path.exists()] == corpus.damages == []


def test_samples_lie_where_the_cases_say(corpus):
    """`tarfile` finds every key in its shard, and what is accepted with its own caption."""
    members = {}
    for path in corpus.paths[: len(corpus.paths) - len(DAMAGES)]:
        with tarfile.open(path) as tar:
            members[path.name] = [
                (m.name, tar.extractfile(m).read() if m.isreg() else None) for m in tar
            ]
    for case in corpus.cases:
        mine = [(name, data) for name, data in members[case.shard] if case.key in name]
        assert mine
        if case.verdict == "accept":
            names = [name for name, _ in mine]
            assert len(set(names)) == len(names)
            assert not any("/" in name for name in names)
            caption = next((data for name, data in mine if name.endswith(".txt")), b"")
            assert caption.decode("utf-8-sig") == case.caption
    for key, plain in corpus.plain.items():
        mine = {name: data for name, data in members[plain.shard] if name.startswith(key)}
        assert mine[f"{key}.png"] == encode(plain.picture)
        assert mine[f"{key}.txt"].decode() == plain.caption


@pytest.mark.parametrize("seed", range(5))
def test_keys_come_twice_apart_in_a_shard_and_in_a_later_one(seed, tmp_path):
    corpus = make_shards(tmp_path, plain=40, per_shard=30, latent=None, damages=False, seed=seed)
    for case in corpus.cases:
        if case.kind == "same key in two shards":
            assert corpus.plain[case.key].shard < case.shard
        if case.kind == "same key twice in a shard":
            with tarfile.open(tmp_path / case.shard) as tar:
                mine = [name.partition(".")[0] == case.key for name in tar.getnames()]
            assert sum(one != other for one, other in pairwise(mine)) >= 2  # others in between


@pytest.mark.parametrize("kind", DAMAGES)
@pytest.mark.parametrize("latent, text", [(None, None), ((4, 8, 12), TEXT)])
def test_a_sample_of_a_damaged_shard_is_intact_where_no_byte_of_it_changed(
    kind, latent, text, tmp_path
):
    corpus = make_shards(tmp_path, difficult=5, plain=20, latent=latent, text=text)
    number = list(DAMAGES).index(kind)
    damage, shapes = corpus.damages[number], Shapes(32, 48, latent, text)
    keys = sorted({*damage.intact, *damage.lost, *damage.either})
    groups = [(key, make_entry("", 0, int(key), 0, shapes).members) for key in keys]
    starts = write_tar(tmp_path / "whole.tar", groups)
    whole = (tmp_path / "whole.tar").read_bytes()
    path = tmp_path / damage.shard
    broken = path.read_bytes() if path.exists() else b""
    same = {k for k in keys if broken[(m := starts[k])[0] : m[-1]] == whole[m[0] : m[-1]]}
    assert same == {*damage.intact, *damage.either}
    assert not damage.lost & same
    for key, plain in damage.intact.items():
        start = starts[key][0] + tarfile.BLOCKSIZE
        assert broken.startswith(encode(plain.picture), start)
        assert plain.shard == damage.shard
    if damage.reason == REASONS["no tar"]:
        with pytest.raises(tarfile.ReadError):
            tarfile.TarFile(fileobj=io.BytesIO(broken))


# ---- folders -------------------------------------------------------------------------------


def test_a_folder_has_one_image_for_each_key_and_captions_beside_them(tmp_path):
    corpus = make_folder(tmp_path, plain=30)
    assert sorted(corpus.paths) == sorted(tmp_path.iterdir())
    assert Counter(case.kind for case in corpus.cases) == Counter(FOLDER_KINDS)
    images = Counter(path.stem for path in corpus.paths if path.suffix != ".txt")
    assert images == Counter([*corpus.plain, *(case.key for case in corpus.cases)])
    for key, plain in corpus.plain.items():
        assert (tmp_path / f"{key}.png").read_bytes() == encode(plain.picture)
        assert (tmp_path / f"{key}.txt").read_text() == plain.caption
