"""A manifest finds every changed byte in its folder, in itself too."""

import json

import pytest

from asymlift.artifacts.manifest import check_manifest, read_manifest, write_manifest
from asymlift.errors import BadData


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "sub").mkdir()
    (tmp_path / "a").write_bytes(b"aaaa")
    (tmp_path / "sub" / "b").write_bytes(b"bb")
    write_manifest(tmp_path, kind="test", facts={"x": [1, 2.5]})
    return tmp_path


def test_a_fresh_folder_is_whole(folder):
    manifest = read_manifest(folder)
    assert manifest.kind == "test"
    assert manifest.facts == {"x": [1, 2.5]}
    assert list(manifest.files) == ["a", "sub/b"]
    assert check_manifest(folder) == []


def test_changed_missing_extra_and_resized_files_are_named(folder):
    (folder / "a").write_bytes(b"aaab")
    (folder / "sub" / "b").unlink()
    (folder / "sub" / "c").touch()
    assert check_manifest(folder) == [
        "sub/c: not in the manifest",
        "a: its bytes have changed (sha256 differs)",
        "sub/b: missing",
    ]
    (folder / "a").write_bytes(b"aaaaa")
    assert "a: 5 bytes, the manifest says 4" in check_manifest(folder)


def test_every_single_byte_change_of_the_manifest_is_found(folder):
    path = folder / "manifest.json"
    good = path.read_bytes()
    for position in range(len(good)):
        for value in {10, 32, good[position] ^ 1} - {good[position]}:
            path.write_bytes(good[:position] + bytes([value]) + good[position + 1 :])
            with pytest.raises(BadData):
                read_manifest(folder)
    for cut in (0, 1, len(good) // 2, len(good) - 1):
        path.write_bytes(good[:cut])
        with pytest.raises(BadData, match="damaged"):
            read_manifest(folder)


def test_a_manifest_cannot_name_files_outside(folder):
    from asymlift.artifacts.manifest import canonical_json, digest_json

    for name in ("../a", "/etc/passwd", "sub/../a", "sub//b"):
        body = json.loads((folder / "manifest.json").read_bytes())
        del body["digest"]
        body["files"] = {name: {"size": 1, "sha256": "0" * 64}}
        body["digest"] = digest_json(body)
        (folder / "manifest.json").write_bytes(canonical_json(body))
        with pytest.raises(BadData, match="not a path inside"):
            read_manifest(folder)


def test_a_folder_without_manifest_is_not_complete(tmp_path):
    with pytest.raises(BadData, match="not complete"):
        read_manifest(tmp_path)
