"""A staged folder takes its target's place at once, and remembers what a killed run finished."""

import pytest

from asymlift.artifacts.files import sha256_file
from asymlift.artifacts.manifest import check_manifest
from asymlift.artifacts.staging import staged_folder
from asymlift.errors import CannotWrite


def writer(data, calls):
    def build(path):
        calls.append(path.name)
        path.write_bytes(data)
        return sha256_file(path)

    return build


def leave_unfinished(target, identity="one"):
    with staged_folder(target, "x") as staged:
        staged.begin(identity)
        staged.make("big", writer(b"123", []))


def test_a_folder_appears_whole_and_nothing_is_left_beside_it(tmp_path):
    target = tmp_path / "runs" / "folder"
    (tmp_path / "carried").write_bytes(b"c")
    with staged_folder(target, "x") as staged:
        assert staged.begin("one")
        assert staged.make("sub/big", writer(b"123", []))
        staged.write("small", b"s")
        staged.link("carried", tmp_path / "carried", sha256_file(tmp_path / "carried"))
        assert not target.exists()
        staged.commit(kind="test", facts={})
    assert check_manifest(target) == []
    assert [path.name for path in target.parent.iterdir()] == ["folder"]


def test_what_a_killed_run_finished_is_not_made_again(tmp_path):
    leave_unfinished(tmp_path / "folder")
    calls = []
    with staged_folder(tmp_path / "folder", "x") as staged:
        assert staged.begin("one")
        assert not staged.make("big", writer(b"123", calls))
        assert calls == []


def test_unless_its_bytes_have_changed(tmp_path):
    leave_unfinished(tmp_path / "folder")
    (tmp_path / ".folder.work/new/big").write_bytes(b"12X")
    calls = []
    with staged_folder(tmp_path / "folder", "x") as staged:
        staged.begin("one")
        assert staged.make("big", writer(b"123", calls))
        assert calls == ["big"]


def test_a_torn_line_in_the_log_is_a_file_that_is_not_finished(tmp_path):
    leave_unfinished(tmp_path / "folder")
    log = tmp_path / ".folder.work/done.jsonl"
    log.write_bytes(log.read_bytes()[:-20])
    with staged_folder(tmp_path / "folder", "x") as staged:
        staged.begin("one")
        assert staged.make("big", writer(b"123", []))


def test_what_was_left_of_something_else_is_discarded(tmp_path):
    leave_unfinished(tmp_path / "folder")
    with staged_folder(tmp_path / "folder", "x") as staged:
        assert not staged.begin("two")
        assert not (staged.new / "big").exists()
        staged.make("other", writer(b"9", []))
        staged.commit(kind="test", facts={})
    assert not (tmp_path / "folder/big").exists()


def test_files_that_nobody_made_do_not_enter_the_folder(tmp_path):
    leave_unfinished(tmp_path / "folder")
    (tmp_path / ".folder.work/new/other.part").touch()
    with staged_folder(tmp_path / "folder", "x") as staged:
        staged.begin("one")
        staged.make("big", writer(b"123", []))
        staged.commit(kind="test", facts={})
    assert sorted(p.name for p in (tmp_path / "folder").iterdir()) == ["big", "manifest.json"]


def test_only_one_process_stages_a_target(tmp_path):
    refused = pytest.raises(CannotWrite, match="another process")
    with staged_folder(tmp_path / "folder", "x"), refused, staged_folder(tmp_path / "folder", "x"):
        pass
    with staged_folder(tmp_path / "other", "x"), staged_folder(tmp_path / "folder", "x"):
        pass
