"""`verify` finds every flipped bit, in every file."""

import random
import shutil

import pytest

from asymlift.stages.convert import convert
from asymlift.stages.verify import verify
from tests.reliability.fake_pipeline import fake_plan

FLIPS = 60


@pytest.fixture(scope="module")
def artifacts(tmp_path_factory):
    """A lifted folder without hard links, and the basis, with the offset of each file's bits."""
    folder = tmp_path_factory.mktemp("flips")
    plan = fake_plan(folder)
    convert(plan)
    shutil.copytree(plan.output, folder / "copy")
    files = [plan.basis, *sorted(p for p in (folder / "copy").rglob("*") if p.is_file())]
    return folder / "copy", plan.basis, files


@pytest.mark.parametrize("seed", range(FLIPS))
def test_a_flipped_bit_is_found_and_its_file_named(seed, artifacts):
    lifted, basis, files = artifacts
    dice = random.Random(seed)
    path = files[seed % len(files)]  # each file several times, however small
    good = path.read_bytes()
    bit = dice.randrange(8 * len(good))
    damaged = bytearray(good)
    damaged[bit // 8] ^= 1 << bit % 8
    path.write_bytes(damaged)
    try:
        verdict = verify(basis if path == basis else lifted)
    finally:
        path.write_bytes(good)
    assert not verdict.ok
    assert any(path.name in problem for problem in verdict.problems)


def test_undamaged_they_are_whole(artifacts):
    lifted, basis, _ = artifacts
    assert verify(lifted).problems == verify(basis).problems == []
