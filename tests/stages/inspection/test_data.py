"""`inspect` of training data: what is in it, where it comes from, and what is wrong with it."""

import json
import time
from dataclasses import replace
from io import BytesIO
from pathlib import Path

import pytest
import torch
from PIL import Image
from typer.testing import CliRunner

from asymlift.cli import app
from asymlift.data.buckets import place
from asymlift.data.packing import pack
from asymlift.data.pictures import encode_png
from asymlift.data.reader import Reader
from asymlift.data.records import LATENT, Sample
from asymlift.data.table import Row, index_path, save_table, table_of
from asymlift.data.writer import Packed, write_shard
from asymlift.errors import BadData, CannotWrite
from asymlift.stages.inspection.data import FIT, SMALLER
from asymlift.stages.inspection.model import inspect_path
from tests.data.small_shards import PNG, raw_tar


def picture(key: str, **parts: object) -> Sample:
    return Sample(key, torch.zeros(3, 16, 24, dtype=torch.uint8), caption=f"scene {key}", **parts)


def full(number: int) -> Sample:
    text = {"encoder_hidden_states": torch.zeros(7, 24)}
    return picture(f"{number:03d}", latent=torch.zeros(4, 4, 6), text=text)


def plain_picture(path: Path, height: int, width: int, caption: str = "") -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(encode_png(torch.zeros(3, height, width, dtype=torch.uint8)))
    if caption:
        path.with_suffix(".txt").write_text(caption)
    return path


def rows_of(path: Path) -> dict[str, str]:
    found = inspect_path(path)
    assert found.problems == []
    json.dumps(found.facts)
    return dict(found.rows)


def test_a_shard(tmp_path):
    write_shard(tmp_path / "a.tar", map(full, range(3)))
    found, rows = inspect_path(tmp_path / "a.tar"), rows_of(tmp_path / "a.tar")
    assert (found.kind, found.title) == ("shard", "a.tar")
    assert rows["samples"].startswith("3, ")
    assert rows["*.png"].startswith("3, ")
    assert rows["image sizes"] == "24 x 16 (3)"
    assert rows["first key"] == "000"
    assert rows["its caption"] == "scene 000"
    assert rows["its image"] == "[3, 16, 24] uint8"
    assert rows["its latent"] == "[4, 4, 6] float32"
    assert rows["its text encoder_hidden_states"] == "[7, 24] float32"
    assert found.facts["members"][LATENT] == 3
    assert found.facts["sizes"] == [[24, 16, 3]]


def test_a_folder_of_prepared_shards_says_what_they_were_made_with(tmp_path):
    made = {"vae": "sha256:" + "0" * 64, "text length": 12}
    for n in range(3):
        write_shard(tmp_path / f"{n}.tar", [full(n)], made=made)
    found, rows = inspect_path(tmp_path), rows_of(tmp_path)
    assert (found.kind, found.facts["num_shards"], found.facts["num_samples"]) == ("shards", 3, 3)
    assert rows["samples"].startswith("3 in 3 shards, ")
    assert rows["buckets"] == "24 x 16 (3)"
    assert rows["made with vae"] == "sha256:000000000000..."
    assert rows["made with text length"] == "12"
    assert found.facts["made"] == made


def test_a_folder_of_pictures(tmp_path):
    for n in range(9):
        plain_picture(tmp_path / f"{n}.png", 1024, 1024 + 64 * (n % 2), "a scene")
    plain_picture(tmp_path / "small.png", 512, 512, "a small one")
    found = inspect_path(tmp_path)
    rows = dict(found.rows)
    assert (found.kind, found.facts["num_samples"]) == ("folder of pictures", 10)
    assert "10; folder of 10 images, captions from text files, " in rows["samples"]
    assert rows["image sizes"] == "1024 x 1024 (5), 1088 x 1024 (4), 512 x 512 (1)"
    fit = rows["at data.resize.sides [1024]"]
    assert fit.startswith("9 of 10 usable; 1024 x 1024 (9); ")
    assert fit.endswith("data.resize.sides: [1024, 512] would keep 1 of 1")
    assert (rows["first key"], rows["its caption"]) == ("0", "a scene")


def test_a_table_with_several_captions(tmp_path):
    plain_picture(tmp_path / "a.png", 1024, 1024)
    line = {"file_name": "a.png", "captions": ["one", "two"]}
    (tmp_path / "list.jsonl").write_text(json.dumps(line))
    found = inspect_path(tmp_path / "list.jsonl")
    assert found.kind == "table of pictures"
    assert [value for name, value in found.rows if name == "its caption"] == ["one", "two"]
    assert found.facts["first"]["captions"] == ["one", "two"]


def test_what_is_wrong_is_told_by_reason(tmp_path):
    members = [(f"{n}.png", b"<html>") for n in range(5)]
    long = encode_png(torch.zeros(3, 8, 80, dtype=torch.uint8))
    path = raw_tar(
        tmp_path / "a.tar", [*members, ("x/y.png", PNG), ("l.png", long), ("z.png", PNG)]
    )
    found = inspect_path(path)
    foreign = f"5 left out, not a JPEG, PNG or WebP image: {path}!0, {path}!1 and 3 more"
    assert found.problems[0] == foreign
    assert found.problems[1].startswith(f"1 left out, key with a path in it: {path}!x/y")
    assert found.problems[2].startswith(f"1 left out, too elongated: {path}!l (80 x 8")
    assert found.facts["left_out"]["not a JPEG, PNG or WebP image"]["count"] == 5
    assert (found.facts["num_samples"], found.facts["num_lost"]) == (1, 6)


def test_a_first_sample_that_cannot_be_read_is_a_problem(tmp_path):
    facts = b'{"width": 9, "height": 9}'
    write_shard(tmp_path / "a.tar", [Packed("a", {".png": PNG, ".json": facts}, 9, 9)])
    (problem,) = inspect_path(tmp_path / "a.tar").problems
    assert problem.startswith(f"{tmp_path}/a.tar!a: wrong size in the facts")


def test_members_that_only_some_samples_have(tmp_path):
    write_shard(tmp_path / "a.tar", [full(0), picture("b"), picture("c")])
    assert inspect_path(tmp_path / "a.tar").problems == [
        "only 1 of 3 samples have a latent",
        "only 1 of 3 samples have a text embedding",
    ]


def test_a_shard_without_any_sample(tmp_path):
    (tmp_path / "a.tar").write_bytes(b"<html>" * 500)
    found = inspect_path(tmp_path / "a.tar")
    assert found.facts["num_samples"] == 0
    assert found.problems == [f"1 left out, not a tar: {tmp_path}/a.tar (no header at byte 0)"]


# ---- pictures ------------------------------------------------------------------------------------


def test_a_contact_sheet_shows_samples_as_the_model_sees_them(tmp_path, monkeypatch):
    for n in range(70):
        plain_picture(tmp_path / "photos" / f"{n}.png", 40 + n % 50, 50, f"scene {n}")
    (tmp_path / "photos" / "broken.png").write_bytes(b"\x89PNG\r\n\x1a\n")
    shown: list[tuple[torch.Tensor, str]] = []
    module = "asymlift.stages.inspection.data.contact_sheet"
    monkeypatch.setattr(module, lambda pictures: shown.extend(pictures) or b"sheet")

    found = inspect_path(tmp_path / "photos", tmp_path / "sheet.png")

    assert (tmp_path / "sheet.png").read_bytes() == b"sheet"
    assert dict(found.rows)["contact sheet"] == str(tmp_path / "sheet.png")
    assert len(shown) == 64 == len({caption for _, caption in shown})
    fit = replace(FIT, sides=SMALLER, upscale=True)
    for image, caption in shown:
        assert tuple(image.shape[1:]) == place(50, 40 + int(caption.split()[1]) % 50, fit)
    first = [caption for _, caption in shown]
    shown.clear()
    inspect_path(tmp_path / "photos", tmp_path / "sheet.png")
    assert [caption for _, caption in shown] == first


def test_the_command_writes_a_picture(tmp_path):
    write_shard(tmp_path / "a.tar", map(full, range(3)))
    arguments = ["inspect", str(tmp_path / "a.tar"), "--picture", str(tmp_path / "sheet.png")]
    result = CliRunner().invoke(app, arguments)
    assert result.exit_code == 0
    assert f"contact sheet {tmp_path}/sheet.png" in " ".join(result.output.split())
    sheet = Image.open(BytesIO((tmp_path / "sheet.png").read_bytes()))
    assert sheet.format == "PNG" and sheet.width <= 2000


@pytest.mark.parametrize("name", ["folder.png", "sheet.jpg", "sheet"])
def test_a_picture_has_to_be_a_png_that_can_be_written(name, tmp_path):
    write_shard(tmp_path / "a.tar", [full(0)])
    (tmp_path / "folder.png").mkdir()
    with pytest.raises(CannotWrite, match=r"name a file that ends in \.png"):
        inspect_path(tmp_path / "a.tar", tmp_path / name)
    inspect_path(tmp_path / "a.tar", tmp_path / "new" / "folder" / "sheet.png")
    assert (tmp_path / "new" / "folder" / "sheet.png").is_file()
    (tmp_path / "file").touch()
    with pytest.raises(CannotWrite, match="cannot write here"):
        inspect_path(tmp_path / "a.tar", tmp_path / "file" / "sheet.png")


def test_a_look_leaves_nothing_beside_the_shards(tmp_path, monkeypatch):
    monkeypatch.setenv("ASYMLIFT_CACHE", str(tmp_path / "cache"))
    (tmp_path / "web").mkdir()
    raw_tar(tmp_path / "web" / "a.tar", [("a.png", PNG), ("a.txt", b"x")])
    inspect_path(tmp_path / "web")
    assert [path.name for path in (tmp_path / "web").iterdir()] == ["a.tar"]
    assert len(list((tmp_path / "cache").rglob("*.safetensors"))) == 1


def test_a_cache_is_no_broken_shard(tmp_path):
    latent = full(0).latent
    assert latent is not None
    members = {LATENT: pack({"latent": latent}, "float16")}
    write_shard(tmp_path / "0.tar", [Packed("a", members, 24, 16)], made={"vae": "x"})
    rows = rows_of(tmp_path)
    assert rows["pictures"] == "none: data.cache takes it"
    assert rows["first key"] == "a" and rows["its latent"] == "[4, 4, 6] float16"
    assert "its image" not in rows and inspect_path(tmp_path).facts["num_samples"] == 1


def test_missing_captions_are_a_problem(tmp_path):
    plain_picture(tmp_path / "a.png", 40, 40, "one")
    plain_picture(tmp_path / "b.png", 40, 40)
    assert inspect_path(tmp_path).problems == ["only 1 of 2 samples have a caption"]


def test_no_picture_that_can_be_shown_is_an_error(tmp_path):
    (tmp_path / "a.tar").write_bytes(b"")
    with pytest.raises(BadData, match="none of its pictures can be shown"):
        inspect_path(tmp_path / "a.tar", tmp_path / "sheet.png")
    assert not (tmp_path / "sheet.png").exists()


def test_many_shards_are_told_from_their_indexes(tmp_path, monkeypatch):
    """Nothing of them is read but one sample."""
    for n in range(300):
        path = tmp_path / f"{n:04d}.tar"
        path.touch()
        rows = [Row(f"{n:04d}{i}", {".png": (0, 5)}, 64, 64) for i in range(10)]
        facts = {"bytes": 0, "sha256": "0", "made": {"vae": "x"}}
        save_table(table_of(path, rows, [], facts), index_path(path))
    read: list[str] = []
    real = Reader.bytes_of
    monkeypatch.setattr(
        Reader, "bytes_of", lambda self, r, s: read.append(r.key) or real(self, r, s)
    )
    started = time.monotonic()
    found = inspect_path(tmp_path)
    assert time.monotonic() - started < 10
    assert found.facts["num_samples"] == 3000
    assert found.facts["sizes"] == [[64, 64, 3000]]
    assert len(set(read)) == 1
