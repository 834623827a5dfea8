"""Every ZeRO stage trains as torch alone does, and gives and takes its state by name.

DeepSpeed keeps global state, so all of it runs once, in a process of its own (engine_checks.py).
"""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.runtime.engine_checks import CASES

UPDATES, UNCLIPPED = 3, 2


@pytest.fixture(scope="module")
def document() -> dict[str, Any]:
    variables = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")
    alone = {key: value for key, value in os.environ.items() if key not in variables}
    done = subprocess.run(
        [sys.executable, "-m", "tests.runtime.engine_checks"],
        cwd=Path(__file__).parents[2],
        env=alone,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    found: dict[str, Any] = json.loads(done.stdout)  # DeepSpeed's lines go to stderr
    return found


@pytest.fixture(params=CASES)
def facts(document, request) -> dict[str, Any]:
    """What one stage did; stage 3 sharded for real, and with small parameters left whole."""
    found: dict[str, Any] = document[request.param]
    return found


def test_an_engine_begins_with_the_modules_weights_and_empty_moments(facts):
    assert facts["begins with its weights"]
    assert (facts["updates at first"], facts["moments at first"]) == (0, 0.0)
    assert facts["shapes"]["first.weight"] == [5, 6] and facts["shapes"]["scale"] == [1]
    assert facts["count"] == 95


def test_clipped_updates_of_three_groups_are_those_of_torch(facts):
    """Weights, moments and the norm before clipping, with two micro-batches per update."""
    assert facts["norms"] == pytest.approx(facts["norms of torch"], rel=1e-6)
    assert min(facts["norms"]) > 0.5  # so that all were clipped
    assert facts["weights against torch"] < 1e-6
    assert facts["moments against torch"] < 1e-6
    assert facts["updates"] == UPDATES


def test_without_clipping_nothing_is_clipped(facts):
    """DeepSpeed's own default is 1."""
    assert facts["unclipped norms"] == pytest.approx(facts["unclipped norms of torch"], rel=1e-6)
    assert min(facts["unclipped norms"]) > 1
    assert facts["weights against torch, unclipped"] < 1e-6


def test_whole_and_shard_are_inverses(facts):
    assert facts["shards"]


def test_shown_weights_are_what_the_forward_reads_and_go_without_a_trace(facts):
    assert facts["shown"] and facts["shown weights"] and facts["showing nothing"]
    assert facts["loss afterwards"] and facts["weights afterwards"]
    assert facts["moments afterwards"] and facts["weights after an error"]


def test_the_state_in_another_engine_goes_on_to_the_last_bit(facts):
    assert facts["restored weights"] and facts["restored moments"]
    assert facts["restored updates"] == UPDATES
    assert facts["restored loss"]  # what the forward reads, not only what AdamW updates
    assert facts["goes on alike"] and facts["norms that go on alike"]


def test_an_update_that_is_not_finite_is_left_out(document):
    for case in CASES:
        facts, whole = document[case], UPDATES + UNCLIPPED
        assert facts["nan norm"] == ("nan" if case == "0" else "inf")
        assert facts["nan left out"]
        assert (facts["skipped"], facts["updates after nan"]) == (1, whole)


def test_the_state_of_any_stage_fits_any_other_to_the_last_bit(document):
    stages = ("0", "1", "3")
    assert document["cross"] == {f"{a} -> {b}": True for a in stages for b in stages}


def test_one_rank_needs_no_launcher_and_agrees_with_itself(document):
    assert document["dist"] == {"summed": [1.0, 2.0], "from first": "x", "barrier": None}
