"""What a recipe names is opened, and what is left out of it is said."""

from pathlib import Path

import pytest
import torch

from asymlift.data.buckets import Fit
from asymlift.data.pictures import encode_png
from asymlift.data.table import index_path
from asymlift.data.writer import Packed, write_shard
from asymlift.errors import BadData
from asymlift.recipe import DataSection
from asymlift.runtime.dist import Ranks
from asymlift.stages import open_data as stage
from asymlift.stages.open_data import (
    check_origin,
    fit_of,
    open_data,
    reader_of,
    tell_what_is_left_out,
)
from tests.data.small_shards import raw_tar


def section(**more: object) -> DataSection:
    return DataSection.model_validate({"train": "x", "resize": {"sides": [16]}, **more})


def picture(height: int, width: int) -> bytes:
    return encode_png(torch.zeros(3, height, width, dtype=torch.uint8))


def shard(path: Path, *sizes: tuple[int, int], **made: object) -> Path:
    samples = (
        Packed(f"{path.stem}-{n}", {".png": picture(h, w)}, w, h) for n, (h, w) in enumerate(sizes)
    )
    write_shard(path, samples, made=made or None)
    return path


def test_a_resize_section_becomes_buckets():
    resize = {"sides": [16, 32], "step": 8, "max_aspect": 3.0, "min_side": 9, "upscale": True}
    assert fit_of(section(resize=resize).resize, 8) == Fit((32, 16), 8, 8, 3.0, 9, upscale=True)


def test_a_reader_knows_where_captions_come_from():
    assert reader_of(section(caption={"source": "label"})).prompt == "label"


@pytest.mark.parametrize("workers", [0, 4])
def test_shards_and_pictures_are_opened_together(tmp_path, workers):
    shards = [shard(tmp_path / f"{n}.tar", (16, 16), (20, 16)) for n in range(3)]
    (tmp_path / "photos" / "cat").mkdir(parents=True)
    (tmp_path / "photos" / "cat" / "a.png").write_bytes(picture(16, 16))
    (tmp_path / "photos" / "cat" / "a.txt").write_text("one\ntwo\n")
    caption = {"labels": "folder", "lines": True}
    data = section(workers=workers, caption=caption)
    catalog = open_data([*map(str, shards), str(tmp_path / "photos")], data, 8)
    assert len(catalog) == 7
    read = reader_of(data).read(catalog[6])
    assert read.facts["captions"] == ["one", "two"]
    assert read.facts["class"] == "cat"


def test_ranks_share_the_indexing_and_all_see_the_same(tmp_path, monkeypatch):
    """The second rank of three indexes its share first; then all shards have an index."""
    for n in range(6):
        raw_tar(tmp_path / f"{n}.tar", [(f"{n}.png", picture(16, 16))])
    order: list[str] = []
    real = stage.indexed
    monkeypatch.setattr(stage, "indexed", lambda path: order.append(path.stem) or real(path))
    monkeypatch.setattr(stage.dist, "first_does", lambda ranks, action: action())
    monkeypatch.setattr(stage.dist, "all_do", lambda ranks, action: action())
    catalog = open_data(str(tmp_path), section(workers=0), 8, Ranks(1, 3, 1))
    assert order == ["1", "4", *"012345"]
    assert list(catalog.keys()) == list("012345")
    assert all(index_path(tmp_path / f"{n}.tar").is_file() for n in range(6))


def test_data_of_which_nothing_can_be_used_is_an_error(tmp_path):
    path = str(shard(tmp_path / "a.tar", (9, 9)))
    with pytest.raises(BadData, match=r"a\.tar!a-0: too small .*\n.*would keep 1 of 1"):
        open_data(path, section(), 8)
    (tmp_path / "b.tar").write_bytes(b"<html>")
    with pytest.raises(BadData, match=r"there are no usable samples\n.*b\.tar: not a tar"):
        open_data(str(tmp_path / "b.tar"), section(), 8)


def test_what_is_left_out_is_told_by_reason_with_a_few_names(tmp_path, monkeypatch):
    shard(tmp_path / "a.tar", (16, 16), *[(9, 9)] * 5)
    (tmp_path / "b.tar").write_bytes(b"")
    said: list[str] = []
    monkeypatch.setattr(stage, "warn", said.append)
    tell_what_is_left_out(open_data(str(tmp_path), section(), 8))
    empty, small = said
    assert empty == f"6 left out, not a tar: {tmp_path}/b.tar (an empty file)"
    assert small.startswith(f"5 left out, too small: {tmp_path}/a.tar!a-1 (9 x 9")
    assert small.count("9 x 9") == 2 and small.endswith(" and 3 more")


MADE = {"vae": "sha256:1", "resize": section().resize.model_dump()}


def test_data_of_this_recipe_passes():
    check_origin(None, {"vae": "sha256:2"}, section(), "train")
    check_origin(MADE, {"vae": "sha256:1"}, section(), "train")
    check_origin(MADE, {"text encoders": "sha256:9"}, section(), "train")  # has no embeddings
    check_origin(MADE, {}, DataSection(train="x"), "train")  # asks for no size


@pytest.mark.parametrize(
    ("wanted", "data", "message"),
    [
        ({"vae": "sha256:2"}, section(), "vae sha256:1,\nbut this recipe has sha256:2: prepare it"),
        ({}, section(resize={"sides": [32]}), r"resize \{'sides': \[16\].*,\nbut .*\[32\]"),
    ],
)
def test_data_of_something_else_is_refused(wanted, data, message):
    with pytest.raises(BadData, match=f"train was prepared with {message}"):
        check_origin(MADE, wanted, data, "train")
