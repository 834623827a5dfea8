"""Whatever a folder or a table holds becomes a record or is counted with a reason."""

import gc
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet
import pytest

from asymlift.data.listing import FOREIGN, Listing, list_pictures
from asymlift.data.records import BadSample, Part, Record
from asymlift.errors import BadData, Unavailable

JPEG, PNG, WEBP = b"\xff\xd8\xff\xe0", b"\x89PNG\r\n\x1a\n", b"RIFF\0\1\2\nWEBP"


def refuse(fault: BadSample) -> None:
    raise fault


def fill(root: Path, **files: str | bytes) -> Path:
    for name, content in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content.encode() if isinstance(content, str) else content)
    return root


def pictures(root: Path, *names: str) -> Path:
    return fill(root, **dict.fromkeys(names, b"picture"))


def facts(record: Record) -> dict[str, Any]:
    return json.loads(record.parts[".json"].inline)


def sources(listing: Listing) -> list[str]:
    return sorted(facts(record)["source"] for record in listing.records)


def caption(record: Record) -> str | None:
    part = record.parts.get(".txt")
    return None if part is None else part.inline.decode()


def listed(path: Path, **options: Any) -> tuple[Listing, list[BadSample]]:
    told: list[BadSample] = []
    return list_pictures(path, on_bad=told.append, **options), told


def table(path: Path, rows: list[dict[str, Any]]) -> Path:
    """The same rows in the format that the name says."""
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.suffix == ".jsonl":
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    elif path.suffix == ".parquet":
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path)
    else:
        lines = [rows[0].keys(), *(row.values() for row in rows)]
        quoted = ([json.dumps(c) if isinstance(c, list) else str(c) for c in ln] for ln in lines)
        cells = (",".join('"' + c.replace('"', '""') + '"' for c in line) for line in quoted)
        path.write_text("\n".join(cells))
    return path


KINDS = pytest.mark.parametrize("kind", [".jsonl", ".csv", ".parquet"])

# ---- folders ---------------------------------------------------------------------------------


def test_a_picture_and_its_caption_become_a_record(tmp_path):
    fill(tmp_path, **{"a.png": b"12345", "a.txt": "a red square"})
    listing = list_pictures(tmp_path, on_bad=refuse)
    image, text = Part(tmp_path / "a.png", 0, 5), Part(tmp_path / "a.txt", 0, 12)
    made = listing.records[0].parts[".json"]
    parts = {".png": image, ".txt": text, ".json": made}
    assert listing.records == [Record("a", str(tmp_path / "a.png"), parts, 0, 0, None)]
    assert facts(listing.records[0]) == {"source": "a.png"}
    assert listing.class_names == []
    assert listing.about == "folder of 1 image, captions from text files"


def test_folders_are_listed_to_the_bottom_and_sorted_by_key(tmp_path):
    pictures(tmp_path, "z.jpg", "b/c/d.webp", "b/a.JPEG", "b.png")
    listing = list_pictures(tmp_path, on_bad=refuse)
    keys = [record.key for record in listing.records]
    assert keys == sorted(keys)
    assert sources(listing) == ["b.png", "b/a.JPEG", "b/c/d.webp", "z.jpg"]
    assert {record.image_suffix for record in listing.records} == {".jpg", ".webp", ".jpeg", ".png"}
    assert listing.about == "folder of 4 images, no captions"


def test_hidden_files_and_folders_are_skipped(tmp_path):
    pictures(tmp_path, "a.png", "._a.png", ".png", ".git/b.png")
    assert sources(list_pictures(tmp_path, on_bad=refuse)) == ["a.png"]


def test_links_to_files_and_folders_are_followed_but_nothing_is_listed_twice(tmp_path):
    root = pictures(tmp_path / "root", "a.png", "sub/b.png")
    pictures(tmp_path / "other", "c.png", "d.png")
    (root / "link.png").symlink_to(tmp_path / "other/c.png")
    (root / "folder").symlink_to(tmp_path / "other")
    (root / "again").symlink_to(root / "sub")
    (root / "sub/up").symlink_to(root)
    (root / "sub/far_up").symlink_to(tmp_path)
    (tmp_path / "other/back").symlink_to(root / "sub")
    expected = ["a.png", "folder/c.png", "folder/d.png", "link.png", "sub/b.png"]
    assert sources(list_pictures(root, on_bad=refuse)) == expected


def test_links_that_lead_nowhere_are_missing_images(tmp_path):
    pictures(tmp_path, "a.png")
    (tmp_path / "gone.png").symlink_to("nowhere.png")
    (tmp_path / "itself.png").symlink_to("itself.png")
    os.mkfifo(tmp_path / "pipe.png")
    listing, told = listed(tmp_path)
    assert sources(listing) == ["a.png"]
    assert [fault.reason for fault in told] == ["image is missing"] * 3
    assert [Path(fault.where).name for fault in told] == ["gone.png", "itself.png", "pipe.png"]


@pytest.mark.parametrize("ending", [*FOREIGN, ".GIF"])
def test_pictures_of_other_kinds_are_reported(tmp_path, ending):
    pictures(tmp_path, "a.png", f"b{ending}", "notes.md", "script.py", "Makefile")
    listing, (fault,) = listed(tmp_path)
    assert sources(listing) == ["a.png"]
    assert fault.reason == "not a JPEG, PNG or WebP image"
    assert fault.where == str(tmp_path / f"b{ending}")


def test_empty_images_are_reported(tmp_path):
    pictures(fill(tmp_path, **{"b.png": b""}), "a.png")
    listing, (fault,) = listed(tmp_path)
    assert sources(listing) == ["a.png"]
    assert (fault.where, fault.reason) == (str(tmp_path / "b.png"), "empty file")


def test_a_picture_that_would_fill_the_memory_is_reported(tmp_path):
    pictures(tmp_path, "a.png", "b.png")
    with (tmp_path / "b.png").open("r+b") as file:
        file.truncate(10**12)  # sparse: it takes no space
    listing, (fault,) = listed(tmp_path)
    assert sources(listing) == ["a.png"]
    assert (fault.where, fault.reason) == (str(tmp_path / "b.png"), "file is too large")


def test_a_strict_caller_stops_at_the_first_fault(tmp_path):
    fill(tmp_path, **{"b.png": b""})
    with pytest.raises(BadSample, match=r"b\.png: empty file"):
        list_pictures(tmp_path, on_bad=refuse)
    assert gc.isenabled()


def test_captions_are_paired_by_stem_within_a_folder(tmp_path):
    pictures(tmp_path, "a.b.png", "A.jpg", "sub/a.png", "plain.png", "blank.png")
    fill(tmp_path, **{"a.b.txt": "1", "A.TXT": "22", "sub/a.txt": "333", "blank.txt": b""})
    records = {facts(r)["source"]: r for r in list_pictures(tmp_path, on_bad=refuse).records}
    sizes = {
        name: record.parts[".txt"].size
        for name, record in records.items()
        if ".txt" in record.parts
    }
    assert sizes == {"a.b.png": 1, "A.jpg": 2, "sub/a.png": 3}


def test_about_counts_captions_where_some_are_missing(tmp_path):
    fill(pictures(tmp_path, "a.png", "b.png"), **{"a.txt": "x"})
    about = "folder of 2 images, 1 with captions from text files"
    assert list_pictures(tmp_path, on_bad=refuse).about == about


def test_json_beside_a_picture_is_not_read(tmp_path):
    fill(pictures(tmp_path, "a.png"), **{"a.json": '{"width": 7, "captions": ["no"]}'})
    assert facts(list_pictures(tmp_path, on_bad=refuse).records[0]) == {"source": "a.png"}


def test_caption_lines_makes_every_line_a_caption(tmp_path):
    pictures(tmp_path, "a.png", "b.png", "c.png")
    fill(
        tmp_path,
        **{"a.txt": b"\xef\xbb\xbfone\r\n\r\n  two \n\n", "b.txt": "only\n", "c.txt": " \n"},
    )
    a, b, c = list_pictures(tmp_path, caption_lines=True, on_bad=refuse).records
    assert [caption(a), caption(b), caption(c)] == ["one", "only", None]
    assert [facts(record).get("captions") for record in (a, b, c)] == [["one", "two"], None, None]


def test_captions_that_cannot_be_read_are_reported(tmp_path):
    pictures(tmp_path, "a.png", "b.png", "c.png", "d.png")
    fill(tmp_path, **{"b.txt": b"\xff\xfe", "a.txt": "fine"})
    (tmp_path / "c.txt").symlink_to("nowhere")
    os.mkfifo(tmp_path / "d.txt")
    listing, told = listed(tmp_path, caption_lines=True)
    assert sources(listing) == ["a.png"]
    reasons = ["caption is not UTF-8", "caption cannot be read", "caption cannot be read"]
    assert [fault.reason for fault in told] == reasons


def test_file_names_cannot_speak_to_the_terminal(tmp_path):
    fill(tmp_path, **{"\x1b[2J.png": b"x", "\udcff.png": b"", "a.png": b"x"})
    listing, (fault,) = listed(tmp_path)
    assert all(record.where.isprintable() for record in listing.records)
    assert str(fault).isprintable()


# ---- what is no listing at all ---------------------------------------------------------------


def test_when_every_picture_is_refused_the_first_reasons_are_said(tmp_path):
    pictures(tmp_path, "a.png", "b.png", "c.png")
    table(tmp_path / "metadata.jsonl", [{"image": f"{name}.png"} for name in "abc"])
    with pytest.raises(BadData) as caught:
        list_pictures(tmp_path, labels="breed", on_bad=lambda fault: None)
    assert str(caught.value).splitlines() == [
        f"{tmp_path}: holds no pictures that can be used",
        f"{tmp_path}/a.png: no class label (column breed)",
        f"{tmp_path}/b.png: no class label (column breed)",
    ]


def test_progress_is_told_now_and_then(tmp_path, monkeypatch):
    monkeypatch.setattr("asymlift.data.listing.TOLD", 2)
    pictures(tmp_path, *(f"{number}.png" for number in range(5)))
    told: list[int] = []
    list_pictures(tmp_path, on_bad=refuse, on_done=told.append)
    assert told == [2, 2]


def test_an_empty_folder_is_refused_and_the_known_endings_named(tmp_path):
    fill(tmp_path, **{"readme.md": "x"})
    with pytest.raises(BadData, match=r"holds no pictures .* \.png, \.jpg, \.jpeg or \.webp"):
        list_pictures(tmp_path, on_bad=refuse)


def test_what_does_not_exist_is_refused(tmp_path):
    with pytest.raises(BadData, match=r"photos: there is no such file"):
        list_pictures(tmp_path / "photos", on_bad=refuse)
    fill(tmp_path, **{"photos.tar": b"x"})
    with pytest.raises(BadData, match=r"neither a folder nor a table; .* \.jsonl, \.csv or"):
        list_pictures(tmp_path / "photos.tar", on_bad=refuse)


def test_a_folder_or_a_table_without_permission_is_named(tmp_path, monkeypatch):
    def forbidden(*args: object, **how: object) -> None:
        raise PermissionError(13, "Permission denied")

    pictures(tmp_path, "a.png")
    path = table(tmp_path / "a.jsonl", [{"image": "a.png"}])
    monkeypatch.setattr(Path, "open", forbidden)
    with pytest.raises(BadData, match=r"a\.jsonl: cannot be read \(Permission denied\)"):
        list_pictures(path, on_bad=refuse)
    monkeypatch.setattr(os, "scandir", forbidden)
    with pytest.raises(BadData, match=r"cannot be read \(Permission denied\)"):
        list_pictures(tmp_path, on_bad=refuse)


# ---- tables ----------------------------------------------------------------------------------


@KINDS
def test_a_folder_uses_its_metadata(tmp_path, kind):
    pictures(tmp_path, "a.png", "sub/b.jpg")
    fill(tmp_path, **{"a.txt": "not read"})
    rows = [{"file_name": "a.png", "text": "one"}, {"file_name": "sub/b.jpg", "text": "two, \n2"}]
    table(tmp_path / f"metadata{kind}", rows)
    listing = list_pictures(tmp_path, on_bad=refuse)
    assert listing.records[0].key == "a"
    assert [caption(record) for record in listing.records] == ["one", "two, \n2"]
    assert listing.records[0].parts[".png"] == Part(tmp_path / "a.png", 0, 7)
    assert listing.records[0].where == str(tmp_path / "a.png")
    assert sources(listing) == ["a.png", "sub/b.jpg"]
    assert listing.about == f"folder of 2 images, captions from metadata{kind}"


@KINDS
def test_a_table_anywhere_names_files_from_its_own_folder_or_absolutely(tmp_path, kind):
    pictures(tmp_path, "sets/a.png", "far/b.png", "c.png", "sets/d.png")
    names = ["./a.png", str(tmp_path / "far/b.png"), "../c.png", str(tmp_path / "sets/d.png")]
    path = table(tmp_path / f"sets/list{kind}", [{"path": name} for name in names])
    listing = list_pictures(path, on_bad=refuse)
    assert sources(listing) == ["../c.png", str(tmp_path / "far/b.png"), "a.png", "d.png"]
    assert listing.about == "table of 4 images, no captions"
    assert {r.image_suffix for r in listing.records} == {".png"}


def test_metadata_in_two_formats_is_refused(tmp_path):
    pictures(tmp_path, "a.png")
    for kind in (".csv", ".jsonl"):
        table(tmp_path / f"metadata{kind}", [{"image": "a.png"}])
    with pytest.raises(BadData, match=r"holds metadata\.jsonl and metadata\.csv"):
        list_pictures(tmp_path, on_bad=refuse)


def test_pictures_that_the_metadata_does_not_name_are_named(tmp_path):
    pictures(tmp_path, "a.png", "b.png", "sub/c.png", "note.gif", ".hidden.png")
    table(tmp_path / "metadata.jsonl", [{"image": "sub/../a.png"}])
    listing, faults = listed(tmp_path)
    assert sources(listing) == ["a.png"]
    names = [f"{tmp_path}/b.png", f"{tmp_path}/sub/c.png"]
    assert list(map(str, faults)) == [f"{name}: not in the metadata" for name in names]
    _, told = listed(tmp_path / "metadata.jsonl")  # the table alone was asked for
    assert told == []


def test_a_picture_is_named_however_the_table_spells_it(tmp_path):
    root = pictures(tmp_path / "root", "a.png", "b.png", "c.png")
    link = tmp_path / "link"
    link.symlink_to(root)
    names = [str(root / "a.png"), "../link/b.png", str(link / "c.png")]
    table(root / "metadata.jsonl", [{"image": name} for name in names])
    assert sources(list_pictures(link, on_bad=refuse)) == ["a.png", "b.png", "c.png"]


@pytest.mark.parametrize("column", ["file_name", "image", "image_path", "path"])
@KINDS
def test_the_image_column_may_have_several_names(tmp_path, kind, column):
    pictures(tmp_path, "a.png")
    path = table(tmp_path / f"t{kind}", [{"id": "7", column: "a.png"}])
    assert sources(list_pictures(path, on_bad=refuse)) == ["a.png"]


@KINDS
def test_a_table_without_an_image_column_is_refused(tmp_path, kind):
    path = table(tmp_path / f"t{kind}", [{"url": "a.png", "text": "x"}])
    known = "file_name, image, image_path or path"
    with pytest.raises(BadData, match=rf"there are: url, text; known: {known}"):
        list_pictures(path, on_bad=refuse)


@KINDS
def test_the_first_caption_column_of_the_known_order_counts(tmp_path, kind):
    pictures(tmp_path, "a.png")
    row = {"captions": ["5", "6"], "prompt": "4", "caption": "3", "text": "2", "image": "a.png"}
    for expected, gone in [("2", "text"), ("3", "caption"), ("4", "prompt"), ("5", "image")]:
        path = table(tmp_path / f"t{kind}", [row])
        (record,) = list_pictures(path, on_bad=refuse).records
        assert caption(record) == expected
        del row[gone]
    assert facts(record)["captions"] == ["5", "6"]


@pytest.mark.parametrize("kind", [".jsonl", ".parquet"])
def test_any_caption_column_may_hold_a_list(tmp_path, kind):
    pictures(tmp_path, "a.png", "b.png", "c.png")
    lists = {"a.png": ["one", " ", "two"], "b.png": ["only"], "c.png": None}
    rows = [{"image": name, "text": captions} for name, captions in lists.items()]
    a, b, c = list_pictures(table(tmp_path / f"t{kind}", rows), on_bad=refuse).records
    assert [caption(record) for record in (a, b, c)] == ["one", "only", None]
    assert [facts(record).get("captions") for record in (a, b, c)] == [["one", "two"], None, None]


@KINDS
def test_faults_of_single_rows_are_reported(tmp_path, kind):
    fill(pictures(tmp_path, "a.png", "b.gif", "c"), **{"d.png": b""})
    names = ["a.png", "gone.png", "./a.png", "http://x.org/a.png", "b.gif", "c", "d.png", "\0.png"]
    if kind == ".csv":
        names.remove("\0.png")
    path = table(tmp_path / f"t{kind}", [{"image": name} for name in [*names, ""]])
    listing, told = listed(path)
    assert sources(listing) == ["a.png"]
    assert [(Path(fault.where).name, fault.reason) for fault in told[:6]] == [
        ("gone.png", "image is missing"),
        ("a.png", "listed twice"),
        (f"t{kind}!{3 if kind == '.parquet' else 4 + (kind == '.csv')}", "image is a URL"),
        ("b.gif", "not a JPEG, PNG or WebP image"),
        ("c", "not a JPEG, PNG or WebP image"),
        ("d.png", "empty file"),
    ]
    assert {fault.reason for fault in told[6:]} == {"image is missing"}
    assert len(told) == len(names)


def test_lines_of_json_that_cannot_be_read_are_reported(tmp_path):
    pictures(tmp_path, "a.png", "b.png")
    lines = [b'{"image": "a.png"}', b"", b"{", b"[1]", b"\xff\xff", b"[" * 100_000]
    path = fill(tmp_path, **{"t.jsonl": b"\n".join([*lines, b'{"image": "b.png"}'])}) / "t.jsonl"
    listing, told = listed(path)
    assert sources(listing) == ["a.png", "b.png"]
    assert {fault.reason for fault in told} == {"metadata line cannot be read"}
    assert [re.match(r"line \d", fault.detail)[0] for fault in told] == [
        f"line {i}" for i in range(3, 7)
    ]


def test_rows_of_json_may_lack_columns(tmp_path):
    pictures(tmp_path, "a.png", "b.png")
    rows = [{"image": "a.png"}, {"file_name": "b.png", "text": "x"}, {"text": "y"}]
    listing, (fault,) = listed(table(tmp_path / "t.jsonl", rows))
    assert [caption(record) for record in listing.records] == [None, "x"]
    assert (fault.reason, fault.where) == ("image is missing", f"{tmp_path}/t.jsonl!3")


def test_rows_of_csv_that_cannot_be_read_are_reported(tmp_path):
    pictures(tmp_path, "a.png", "b.png")
    lines = [
        "image, text",
        "a.png,one",
        "",
        "b.png,two, three",
        "b.png",
        'b.png,"x"y',
        "b.png,\xff",
    ]
    text = "\n".join([*lines, 'b.png,"never', "closed", "again"])
    path = fill(tmp_path, **{"t.csv": text.encode("latin-1")}) / "t.csv"
    listing, told = listed(path)
    assert [caption(record) for record in listing.records] == ["one"]
    assert {fault.reason for fault in told} == {"metadata line cannot be read"}
    numbers = [re.match(r"line \d", fault.detail)[0] for fault in told]
    assert numbers == [f"line {number}" for number in range(4, 9)]
    assert [fault.count for fault in told] == [1, 1, 1, 1, 3]  # the open quote took three lines


def test_csv_may_have_a_byte_order_mark_and_large_fields(tmp_path):
    pictures(tmp_path, "a.png")
    text = f'\ufeffimage,text\r\na.png,"{"long " * 100_000}\r\nend"\r\n'
    path = fill(tmp_path, **{"t.csv": text}) / "t.csv"
    (record,) = list_pictures(path, on_bad=refuse).records
    assert caption(record) == "long " * 100_000 + "\r\nend"


def test_captions_in_csv_are_a_json_list_or_plain_text(tmp_path):
    pictures(tmp_path, "a.png", "b.png", "c.png")
    text = 'image,captions\na.png,"[""x"", ""y""]"\nb.png,plain\nc.png,[\'z\']\n'
    listing, (fault,) = listed(fill(tmp_path, **{"t.csv": text}) / "t.csv")
    a, b = listing.records
    assert (facts(a)["captions"], caption(b)) == (["x", "y"], "plain")
    assert fault.detail == "line 4: captions are not a JSON list"


@pytest.mark.parametrize("cell", ["5", "[1, 2]", '{"en": "x"}', '[["x"]]'])
def test_captions_that_are_no_text_are_reported(tmp_path, cell):
    pictures(tmp_path, "a.png", "b.png")
    text = f'{{"image": "a.png", "text": {cell}}}\n{{"image": "b.png"}}\n'
    listing, (fault,) = listed(fill(tmp_path, **{"t.jsonl": text}) / "t.jsonl")
    assert sources(listing) == ["b.png"]
    assert (fault.where, fault.reason) == (str(tmp_path / "a.png"), "caption is not text")


def test_half_a_character_in_a_caption_is_reported(tmp_path):
    pictures(tmp_path, "a.png", "b.png")
    text = '{"image": "a.png", "text": "\\ud800"}\n{"image": "b.png", "text": "\\ud83d\\ude00"}\n'
    listing, (fault,) = listed(fill(tmp_path, **{"t.jsonl": text}) / "t.jsonl")
    assert [caption(record) for record in listing.records] == ["\N{GRINNING FACE}"]
    assert fault.reason == "caption is not UTF-8"


# ---- parquet ---------------------------------------------------------------------------------


def test_parquet_without_pyarrow_says_what_to_install(tmp_path, monkeypatch):
    path = table(tmp_path / "t.parquet", [{"image": "a.png"}])
    monkeypatch.setitem(sys.modules, "pyarrow.parquet", None)
    with pytest.raises(Unavailable, match=r"pip install 'asymlift\[parquet\]'"):
        list_pictures(path, on_bad=refuse)


def test_pyarrow_is_not_imported_for_other_tables():
    code = "import sys, asymlift.data.listing; sys.exit('pyarrow' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


def test_a_damaged_parquet_file_is_refused(tmp_path):
    path = table(tmp_path / "t.parquet", [{"image": f"{i}.png"} for i in range(5000)])
    whole = path.read_bytes()
    for data in (b"", b"PAR1 and more", whole[:-20], whole[:4] + bytes(900) + whole[904:]):
        path.write_bytes(data)
        with pytest.raises(BadData, match=r"t\.parquet: damaged, or not a parquet file"):
            listed(path)


def test_embedded_images_become_inline_parts(tmp_path):
    pictures(tmp_path, "a.png")
    cells = [
        {"bytes": JPEG, "path": "0001.png"},
        {"bytes": PNG, "path": None},
        {"bytes": WEBP, "path": None},
        {"bytes": None, "path": "a.png"},
        {"bytes": b"GIF89a", "path": "x.png"},
        {"bytes": b"", "path": "x.png"},
        {"bytes": None, "path": None},
        None,
    ]
    rows = [
        {"file_name": "gone.png", "image": cell, "text": f"{i}"} for i, cell in enumerate(cells)
    ]
    rows[-1]["file_name"] = None
    path = table(tmp_path / "train.parquet", rows)
    listing, told = listed(path)
    keys = ["a", "train-0", "train-1", "train-2"]
    assert [record.key for record in listing.records] == keys
    _, jpeg, png, webp = listing.records
    assert jpeg.parts[".jpg"] == Part(None, 0, 4, inline=JPEG)
    assert png.parts[".png"].inline == PNG
    assert webp.parts[".webp"].inline == WEBP
    assert [record.where for record in (jpeg, png)] == [f"{path}!0", f"{path}!1"]
    assert facts(webp) == {"source": "train.parquet!2"}
    assert [caption(record) for record in listing.records] == ["3", "0", "1", "2"]
    assert [(fault.where, fault.reason) for fault in told] == [
        (f"{path}!4", "not a JPEG, PNG or WebP image"),
        (f"{path}!5", "empty file"),
        (f"{path}!6", "image is missing"),
        (f"{path}!7", "image is missing"),
    ]


def test_rows_keep_their_numbers_across_batches(tmp_path, monkeypatch):
    monkeypatch.setattr("asymlift.data.listing.PARQUET_ROWS", 3)
    path = table(tmp_path / "t.parquet", [{"image": JPEG, "text": f"{i}"} for i in range(8)])
    listing = list_pictures(path, on_bad=refuse)
    assert [record.key for record in listing.records] == [f"t-{i}" for i in range(8)]
    assert [caption(record) for record in listing.records] == [f"{i}" for i in range(8)]


# ---- labels ----------------------------------------------------------------------------------


def test_the_first_folder_is_the_class(tmp_path):
    pictures(tmp_path, "dog/x/a.png", "cat/b.png", "dog/c.png", "top.png")
    listing, (fault,) = listed(tmp_path, labels="folder")
    assert listing.class_names == ["cat", "dog"]
    labels = {facts(r)["source"]: (facts(r)["label"], facts(r)["class"]) for r in listing.records}
    assert labels == {"cat/b.png": (0, "cat"), "dog/c.png": (1, "dog"), "dog/x/a.png": (1, "dog")}
    assert (fault.where, fault.reason) == (str(tmp_path / "top.png"), "no class label")
    assert listing.about == "folder of 3 images, no captions, 2 classes"


def test_a_table_may_take_classes_from_folders_too(tmp_path):
    pictures(tmp_path, "sets/cat/a.png", "b.png")
    names = ["cat/a.png", "../b.png", str(tmp_path / "b.png")]
    path = table(tmp_path / "sets/t.jsonl", [{"image": name} for name in names])
    listing, told = listed(path, labels="folder")
    assert listing.class_names == ["cat"]
    assert [fault.reason for fault in told] == ["no class label"] * 2


@KINDS
def test_names_are_numbered_in_sorted_order(tmp_path, kind):
    pictures(tmp_path, "a.png", "b.png", "c.png")
    styles = {"a.png": "oil", "b.png": "ink", "c.png": "oil"}
    rows = [{"image": name, "style": style} for name, style in styles.items()]
    listing = list_pictures(table(tmp_path / f"t{kind}", rows), labels="style", on_bad=refuse)
    assert listing.class_names == ["ink", "oil"]
    assert [facts(record)["label"] for record in listing.records] == [1, 0, 1]


@KINDS
def test_integers_stay_what_they_are(tmp_path, kind):
    pictures(tmp_path, "a.png", "b.png", "c.png")
    labels = {"a.png": 10, "b.png": 2, "c.png": 0}
    rows = [{"image": name, "y": label} for name, label in labels.items()]
    listing = list_pictures(table(tmp_path / f"t{kind}", rows), labels="y", on_bad=refuse)
    assert [facts(record)["label"] for record in listing.records] == [10, 2, 0]
    assert listing.class_names == [str(number) for number in range(11)]
    assert [facts(record)["class"] for record in listing.records] == ["10", "2", "0"]


def test_missing_labels_are_reported(tmp_path):
    cells = [3.0, "none", float("nan"), None, "", -1, [1], 10**7]
    names = [f"{number}.png" for number in range(len(cells))]
    pictures(tmp_path, *names, "last.png")
    rows = [{"image": name, "y": cell} for name, cell in zip(names, cells, strict=True)]
    listing, told = listed(table(tmp_path / "t.jsonl", [*rows, {"image": "last.png"}]), labels="y")
    assert listing.class_names == ["3", "none"]
    assert [fault.reason for fault in told].count("no class label") == 6
    assert [fault.detail for fault in told if fault.reason == "class label is too large"] == [
        "10000000, the limit is 999999"
    ]
    assert {fault.where for fault in told} == {str(tmp_path / n) for n in [*names[2:], "last.png"]}


def test_yes_and_no_are_names(tmp_path):
    pictures(tmp_path, "a.png", "b.png")
    rows = [{"image": "a.png", "y": True}, {"image": "b.png", "y": False}]
    listing = list_pictures(table(tmp_path / "t.jsonl", rows), labels="y", on_bad=refuse)
    assert listing.class_names == ["False", "True"]


def test_a_label_column_that_is_not_there_is_refused(tmp_path):
    pictures(tmp_path, "a.png")
    for kind in (".csv", ".parquet"):
        path = table(tmp_path / f"t{kind}", [{"image": "a.png", "text": "x"}])
        with pytest.raises(BadData, match=r"no column style for labels; there are: image, text"):
            list_pictures(path, labels="style", on_bad=refuse)
    with pytest.raises(BadData, match=r"column 'style', but there is no metadata"):
        list_pictures(tmp_path, labels="style", on_bad=refuse)


# ---- keys ------------------------------------------------------------------------------------


def test_plain_names_in_the_root_are_their_own_keys(tmp_path):
    pictures(tmp_path, "IMG_0001-a.png", "a b.png", "a.b.png", "caf\u00e9.png", "sub/x.png")
    keys = {facts(r)["source"]: r.key for r in list_pictures(tmp_path, on_bad=refuse).records}
    assert keys["IMG_0001-a.png"] == "IMG_0001-a"
    shapes = {"a b.png": "a-b", "a.b.png": "a-b", "caf\u00e9.png": "caf-", "sub/x.png": "sub-x"}
    for name, readable in shapes.items():
        assert re.fullmatch(rf"{readable}-[0-9a-f]{{8}}", keys[name])
    assert len(set(keys.values())) == 5


def test_equal_stems_are_told_apart_on_both_sides(tmp_path):
    pictures(tmp_path, "a.jpg", "a.png", "b.png")
    keys = [record.key for record in list_pictures(tmp_path, on_bad=refuse).records]
    assert all(re.fullmatch(r"a-[0-9a-f]{8}", key) for key in keys[:2])
    assert keys[2] == "b"


def test_a_key_that_is_taken_is_reported(tmp_path):
    pictures(tmp_path, "a.jpg", "a.png")
    key = list_pictures(tmp_path, on_bad=refuse).records[0].key
    pictures(tmp_path, f"{key}.webp")
    listing, (fault,) = listed(tmp_path)
    assert len(listing.records) == 2
    assert (fault.reason, fault.detail) == ("duplicate key", key)


def test_keys_do_not_depend_on_where_the_root_lies(tmp_path, monkeypatch):
    pictures(tmp_path / "one", "a.png", "b/c d.png", "b/\udcff.png", "x/" * 60 + "deep.png")
    shutil.copytree(tmp_path / "one", tmp_path / "far/two")
    names = sources(list_pictures(tmp_path / "one", on_bad=refuse))
    table(tmp_path / "one/t.jsonl", [{"image": name} for name in names])
    rows = [{"image": str(tmp_path / "far/two" / name)} for name in names]
    table(tmp_path / "far/two/t.jsonl", rows)
    monkeypatch.chdir(tmp_path / "one")
    roots = [".", tmp_path / "one", tmp_path / "far/two", "t.jsonl", tmp_path / "far/two/t.jsonl"]
    keys = [[r.key for r in list_pictures(Path(root), on_bad=refuse).records] for root in roots]
    assert keys[1:] == keys[:-1]
    assert all(re.fullmatch(r"[A-Za-z0-9_-]{1,129}", key) for key in keys[0])
