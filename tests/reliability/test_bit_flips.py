"""`verify` finds every flipped bit, in every file, and names the file."""

import random

import pytest

from asymlift.stages.verify import verify
from tests.reliability.bit_flips import flip_everywhere, make_artifacts, with_flipped_bit


@pytest.fixture(scope="module")
def artifacts(tmp_path_factory):
    return make_artifacts(tmp_path_factory.mktemp("flips"))


def test_undamaged_they_are_whole(artifacts):
    for path in artifacts.paths.values():
        assert verify(path).problems == []


@pytest.mark.parametrize("name", ["basis", "lifted", "checkpoint", "shards"])
def test_a_flipped_bit_in_any_file_is_found_and_the_file_named(name, artifacts):
    dice = random.Random(0)
    for path in artifacts.files(name):
        verdict = with_flipped_bit(artifacts, name, path, dice)
        assert any(path.name in problem for problem in verdict.problems), (path, verdict)


def test_fifty_bits_anywhere_are_found(artifacts):
    found = flip_everywhere(artifacts, 50, seed=1)
    assert found["missed"] == {}
    assert found["flips"] == 50
