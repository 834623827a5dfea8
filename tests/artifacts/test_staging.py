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
    (tmp_path / "carried").write_bytes(b"123")
    with staged_folder(target, "x") as staged:
        assert staged.begin("one")
        assert staged.make("sub/big", writer(b"123", []), origin)
        staged.write("small", b"s")
        assert staged.link(
            "carried", tmp_path / "carried", lambda: sha256_file(staged.new / "sub/big")
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


@pytest.fixture
def no_links(monkeypatch):
    """As on another file system. Collects what is copied."""

    def copy(source, target):
        copied.append(target.name)
        shutil.copy(source, target)
        return sha256_file(target)

    copied = []
    monkeypatch.setattr(staging, "link_or_copy", copy)
    return copied


def copy_carried(folder):
    with staged_folder(folder / "folder", "x") as staged:
        staged.begin("one")
        assert not staged.link("copy", folder / "carried", lambda: sha256_file(folder / "carried"))
        assert staged.sha256["copy"] == sha256_file(folder / "carried")


def test_what_a_killed_run_copied_is_not_copied_again(tmp_path, no_links):
    (tmp_path / "carried").write_bytes(b"1")
    copy_carried(tmp_path)
    copy_carried(tmp_path)
    assert no_links == ["copy"]


@pytest.mark.parametrize("changed", ["carried", ".folder.work/new/copy"])
def test_unless_the_copy_or_its_source_has_changed(changed, tmp_path, no_links):
    (tmp_path / "carried").write_bytes(b"1")
    copy_carried(tmp_path)
    (tmp_path / changed).write_bytes(b"2")
    copy_carried(tmp_path)
    assert no_links == ["copy", "copy"]


def test_a_file_that_changes_while_it_is_copied_is_bad_data(tmp_path, monkeypatch):
    (tmp_path / "carried").write_bytes(b"1")
    monkeypatch.setattr(staging, "link_or_copy", lambda source, target: "its sha256 now")
    changed = pytest.raises(BadData, match="carried: changed while it was copied")
    with staged_folder(tmp_path / "folder", "x") as staged, changed:
        staged.link("carried", tmp_path / "carried", lambda: "its sha256 before")


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
