"""finetune is killed, at random moments and inside its saves, and its disk fills up."""

import json
import shutil

import pytest

from tests.reliability.injector import build, run_under
from tests.reliability.started import told_by

needs_gcc = pytest.mark.skipif(shutil.which("gcc") is None, reason="the injector needs gcc")


def test_killed_three_times_it_ends_with_the_same_losses_weights_and_pictures():
    found = told_by("kill_finetune", "2", "3", "4", "20")
    assert found["problems"] == []
    assert found["kills after which the run ended equal"] == found["kills"] == 3
    assert found["runs that ended equal"] == found["runs"]


@pytest.fixture(scope="module")
def saves(tmp_path_factory):
    """Kills of rank 0, which writes, and of rank 1 meanwhile; then full disks. ZeRO-3."""
    library = build(tmp_path_factory.mktemp("injector"))
    words = ("2", "3", "kill:0:40:9:90", "kill:1:40:21:102", "fill:1:7:19", "once:7")
    return json.loads(run_under(library, "tests.reliability.kill_saves", *words))


@needs_gcc
def test_killed_in_a_save_it_goes_on_from_what_was_committed(saves):
    """Half a tensor, the last files, the rename, the removal of the checkpoint before."""
    for found in saves[:2]:
        assert found["problems"] == []
        assert found["killed"] == 3
        assert len(found["newest committed then"]) == 2  # before a rename, and after it


@needs_gcc
def test_a_full_disk_ends_the_run_with_its_place_and_what_is_needed_and_free(saves):
    for found in saves[2]:
        assert found["exits"] == [73, 73]
        assert found["newest committed"] == 2  # the last good one is whole
        assert found["problems"] == []  # with space again, the same command ends equal
        for words in ("/hunted/checkpoints", "free", "needs"):
            assert words in found["message"], found["message"]


@needs_gcc
def test_training_goes_on_after_one_save_that_failed(saves):
    [found] = saves[3]
    assert found["exits"] == [0, 0]
    assert "training goes on" in found["message"]
    assert found["problems"] == []
