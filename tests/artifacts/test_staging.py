"""A staged folder takes its target's place at once, and remembers what a killed run finished."""

import shutil

import pytest

from asymlift.artifacts import staging
from asymlift.artifacts.files import sha256_file
from asymlift.artifacts.manifest import check_manifest
from asymlift.artifacts.staging import staged_folder
from asymlift.errors import BadData, CannotWrite


def writer(data, calls):
    def build(path):
        calls.append(path.name)
        path.write_bytes(data)
        return sha256_file(path)

    return build


def origin():
    return "0123"


def leave_unfinished(target, identity="one"):
    with staged_folder(target, "x") as staged:
        staged.begin(identity)
        staged.make("big", writer(b"123", []), origin)


def test_a_folder_appears_whole_and_nothing_is_left_beside_it(tmp_path):
    target = tmp_path / "runs" / "folder"
    (tmp_path / "a.safetensors").write_bytes(b"123")
    with staged_folder(target, "x") as staged:
        assert staged.begin("one")
        assert staged.make("sub/big", writer(b"123", []), origin)
        staged.write("small", b"s")
        assert staged.take(
            "carried", tmp_path / "a.safetensors", lambda: sha256_file(staged.new / "sub/big")
        )
        assert not target.exists()
        staged.commit(kind="test", facts={})
    assert check_manifest(target) == []
    assert [path.name for path in target.parent.iterdir()] == ["folder"]


def test_what_a_killed_run_finished_is_not_made_again(tmp_path):
    leave_unfinished(tmp_path / "folder")
    calls = []
    with staged_folder(tmp_path / "folder", "x") as staged:
        assert staged.begin("one")
        assert not staged.make("big", writer(b"123", calls), origin)
        assert calls == []


def test_unless_its_bytes_have_changed(tmp_path):
    leave_unfinished(tmp_path / "folder")
    (tmp_path / ".folder.work/new/big").write_bytes(b"12X")
    calls = []
    with staged_folder(tmp_path / "folder", "x") as staged:
        staged.begin("one")
        assert staged.make("big", writer(b"123", calls), origin)
        assert calls == ["big"]


def test_or_the_file_it_was_made_from_has_changed(tmp_path):
    leave_unfinished(tmp_path / "folder")
    with staged_folder(tmp_path / "folder", "x") as staged:
        staged.begin("one")
        assert staged.make("big", writer(b"123", []), lambda: "4567")


@pytest.mark.parametrize(
    ("name", "shared"),
    [
        ("model_index.json", False),
        ("vocab.txt", False),
        ("model.onnx", True),
        ("a.safetensors", True),
    ],
)
def test_what_people_edit_is_copied_and_the_rest_costs_no_space(
    name, shared, tmp_path, monkeypatch
):
    monkeypatch.setattr(staging, "LARGE", 100)
    source = tmp_path / name
    source.write_bytes(b"1" * (100 if name == "model.onnx" else 99))
    with staged_folder(tmp_path / "folder", "x") as staged:
        staged.begin("one")
        assert staged.take(name, source, lambda: sha256_file(source)) == shared
        assert (staged.new / name).samefile(source) == shared
        assert (staged.new / name).read_bytes() == source.read_bytes()


def test_a_link_that_was_left_where_a_copy_belongs_is_replaced(tmp_path):
    (tmp_path / "a.json").write_bytes(b"1")
    with staged_folder(tmp_path / "folder", "x") as staged:
        staged.begin("one")
        (staged.new / "a.json").hardlink_to(tmp_path / "a.json")
        assert not staged.take(
            "a.json", tmp_path / "a.json", lambda: sha256_file(tmp_path / "a.json")
        )
        assert not (staged.new / "a.json").samefile(tmp_path / "a.json")


@pytest.fixture(params=["a.json", "a.safetensors"])
def carried(request, tmp_path, monkeypatch):
    """A file that is taken over, as on another file system. Collects what is copied."""

    def copy(source, target):
        copied.append(target.name)
        shutil.copy(source, target)
        return sha256_file(target)

    copied = []
    monkeypatch.setattr(staging, "link_or_copy", copy)
    monkeypatch.setattr(staging, "copy_file", copy)
    (tmp_path / request.param).write_bytes(b"1")
    return tmp_path / request.param, copied


def copy_carried(source):
    with staged_folder(source.parent / "folder", "x") as staged:
        staged.begin("one")
        assert not staged.take("copy", source, lambda: sha256_file(source))
        assert staged.sha256["copy"] == sha256_file(source)


def test_what_a_killed_run_copied_is_not_copied_again(carried):
    source, copied = carried
    copy_carried(source)
    copy_carried(source)
    assert copied == ["copy"]


@pytest.mark.parametrize("place", ["source", "copy"])
def test_unless_the_copy_or_its_source_has_changed(place, carried, tmp_path):
    source, copied = carried
    copy_carried(source)
    changed = {"source": source, "copy": tmp_path / ".folder.work/new/copy"}[place]
    changed.write_bytes(b"2")
    copy_carried(source)
    assert copied == ["copy", "copy"]


def test_a_file_that_changes_while_it_is_copied_is_bad_data(tmp_path):
    (tmp_path / "carried").write_bytes(b"1")
    changed = pytest.raises(BadData, match="carried: changed while it was copied")
    with staged_folder(tmp_path / "folder", "x") as staged, changed:
        staged.take("carried", tmp_path / "carried", lambda: "its sha256 before")


def test_a_torn_line_in_the_log_is_a_file_that_is_not_finished(tmp_path):
    leave_unfinished(tmp_path / "folder")
    log = tmp_path / ".folder.work/done.jsonl"
    log.write_bytes(log.read_bytes()[:-20])
    with staged_folder(tmp_path / "folder", "x") as staged:
        staged.begin("one")
        assert staged.make("big", writer(b"123", []), origin)


def test_what_was_left_of_something_else_is_discarded(tmp_path):
    leave_unfinished(tmp_path / "folder")
    with staged_folder(tmp_path / "folder", "x") as staged:
        assert not staged.begin("two")
        assert not (staged.new / "big").exists()
        staged.make("other", writer(b"9", []), origin)
        staged.commit(kind="test", facts={})
    assert not (tmp_path / "folder/big").exists()


def test_files_that_nobody_made_do_not_enter_the_folder(tmp_path):
    leave_unfinished(tmp_path / "folder")
    (tmp_path / ".folder.work/new/other.part").touch()
    with staged_folder(tmp_path / "folder", "x") as staged:
        staged.begin("one")
        staged.make("big", writer(b"123", []), origin)
        staged.commit(kind="test", facts={})
    assert sorted(p.name for p in (tmp_path / "folder").iterdir()) == ["big", "manifest.json"]


@pytest.mark.parametrize("name", ["../escaped", "sub/../../escaped", "/tmp/escaped"])
def test_nothing_is_written_outside_the_folder(name, tmp_path):
    with staged_folder(tmp_path / "folder", "x") as staged, pytest.raises(AssertionError):
        staged.write(name, b"1")
    assert list(tmp_path.iterdir()) == []


def test_only_one_process_stages_a_target(tmp_path):
    refused = pytest.raises(CannotWrite, match="another process")
    with staged_folder(tmp_path / "folder", "x"), refused, staged_folder(tmp_path / "folder", "x"):
        pass
    with staged_folder(tmp_path / "other", "x"), staged_folder(tmp_path / "folder", "x"):
        pass
