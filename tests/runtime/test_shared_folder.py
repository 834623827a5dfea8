"""A folder that another rank does not see is refused, and nothing stays behind."""

import pytest

from asymlift.errors import CannotWrite, Exit
from asymlift.runtime import dist
from asymlift.runtime.dist import Ranks
from asymlift.runtime.shared_folder import check_shared


def as_rank_one(monkeypatch, name: str) -> None:
    """What rank 0 says, without rank 0."""
    monkeypatch.setattr(dist, "first_does", lambda ranks, action: (name, "node1"))
    monkeypatch.setattr(dist, "all_do", lambda ranks, action: action())


def test_alone_a_folder_is_shared(tmp_path):
    check_shared(tmp_path / "not there", Ranks(0, 1, 0))


def test_a_rank_that_sees_what_rank_0_wrote_goes_on(tmp_path, monkeypatch):
    (tmp_path / ".shared-1").touch()
    as_rank_one(monkeypatch, ".shared-1")
    check_shared(tmp_path, Ranks(1, 2, 1), patience=0)


def test_a_rank_that_does_not_is_named_after_some_patience(tmp_path, monkeypatch):
    as_rank_one(monkeypatch, ".shared-1")
    with pytest.raises(CannotWrite) as caught:
        check_shared(tmp_path, Ranks(3, 4, 1), patience=0.2)
    assert caught.value.exit == Exit.CANNOT_WRITE
    said = str(caught.value)
    assert said.startswith(f"{tmp_path}: on rank 3 (") and "rank 0 (node1) writes to" in said
    assert list(tmp_path.iterdir()) == []
