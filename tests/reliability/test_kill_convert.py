"""Convert is killed at every file operation, and its disk fills up; nothing wrong is ever left."""

import json
import shutil

import pytest

from tests.reliability.injector import build, run_under

pytestmark = pytest.mark.skipif(shutil.which("gcc") is None, reason="the injector needs gcc")
DRIVER = "tests.reliability.kill_convert"


@pytest.fixture(scope="module")
def library(tmp_path_factory):
    return build(tmp_path_factory.mktemp("injector"))


@pytest.mark.parametrize("target", ["empty", "old"])
def test_killed_anywhere_the_target_is_old_absent_or_new_and_a_second_run_ends_right(
    target, library
):
    found = json.loads(run_under(library, DRIVER, "everywhere", target))
    assert found["problems"] == []
    assert found["points"] > 100  # each file is made, written, flushed and named
    before = {"empty": "absent", "old": "old"}[target]
    assert found["states"].keys() <= {before, "absent", "new"}
    assert found["states"][before] > 80
    assert found["states"]["new"] > 0
    assert found["weight files kept by second runs"] > 50
    if target == "old":
        assert found["states"]["absent"] == 1  # between two renames


def test_a_full_disk_leaves_the_old_target_and_says_where_and_how_much_is_free(library):
    at = ["1", "4", "12"]  # the lock, a shard, the last files
    for found in json.loads(run_under(library, DRIVER, "fill", "old", *at)):
        assert found["exit"] == 73
        assert found["state"] == "old"
        assert "/run/.lifted" in found["message"]
        assert "free here" in found["message"]
        assert found["problem"] == ""  # with space again, the same command succeeds
