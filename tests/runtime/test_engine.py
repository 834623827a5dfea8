"""Every ZeRO stage, place and optimizer trains as torch alone does, and gives and takes its state.

DeepSpeed keeps global state, so all of it runs once per number of ranks, in processes of its own
(engine_checks.py).
"""

import json
import os
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.runtime.engine_checks import CASES, CLIP, CROSSED, EIGHT_BIT, HAS_8_BIT, OF_TWO_RANKS

UPDATES, UNCLIPPED = 3, 2
ALL = [(1, name) for name in (*CASES, *EIGHT_BIT)] + [(2, name) for name in OF_TWO_RANKS]


def run(ranks: int) -> dict[str, Any]:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    processes = [
        subprocess.Popen(
            [sys.executable, "-m", "tests.runtime.engine_checks"],
            cwd=Path(__file__).parents[2],
            env=environment(rank, ranks, port),
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(ranks)
    ]
    try:
        said = [process.communicate(timeout=240) for process in processes]
    finally:
        for process in processes:
            process.kill()
    assert all(process.returncode == 0 for process in processes), said
    found: dict[str, Any] = json.loads(said[0][0])  # DeepSpeed's lines go to stderr
    return found


def environment(rank: int, ranks: int, port: int) -> dict[str, str]:
    variables = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")
    rest = {key: value for key, value in os.environ.items() if key not in variables}
    if ranks == 1:
        return rest  # one rank needs no launcher
    numbers = (rank, ranks, rank, "127.0.0.1", port)
    return {**rest, **{key: str(value) for key, value in zip(variables, numbers, strict=True)}}


@pytest.fixture(scope="module")
def documents() -> dict[int, dict[str, Any]]:
    return {ranks: run(ranks) for ranks in (1, 2)}


@pytest.fixture(params=ALL, ids=lambda case: f"{case[0]} rank(s), {case[1]}")
def facts(documents, request) -> dict[str, Any]:
    """What one engine did; stage 3 sharded for real, and with small parameters left whole."""
    ranks, name = request.param
    if name in EIGHT_BIT and not HAS_8_BIT:
        pytest.skip("bitsandbytes is not installed")
    found: dict[str, Any] = documents[ranks][name]
    return {**found, "name": name, "tolerance": 0.1 if name in EIGHT_BIT else 1e-6}


def test_an_engine_begins_with_the_modules_weights_and_empty_moments(facts):
    assert facts["begins with its weights"]
    assert (facts["updates at first"], facts["moments at first"]) == (0, 0.0)
    assert facts["shapes"]["first.weight"][1] == 6 and facts["shapes"]["scale"] == [1]
    assert facts["count"]


def test_clipped_updates_of_three_groups_are_those_of_torch(facts):
    """Weights, moments and the norm before clipping, with two micro-batches per update.

    Muon is written out there, and AdamW with moments of 8 bits differs by what they round.
    """
    tolerance = facts["tolerance"]
    assert facts["norms"] == pytest.approx(facts["norms of torch"], rel=tolerance)
    assert max(facts["norms"]) > 2 * CLIP
    assert facts["weights against torch"] < tolerance
    assert facts["moments against torch"] < tolerance
    assert facts["updates"] == UPDATES


def test_without_clipping_nothing_is_clipped(facts):
    """DeepSpeed's own default is 1."""
    tolerance = facts["tolerance"]
    assert facts["unclipped norms"] == pytest.approx(
        facts["unclipped norms of torch"], rel=tolerance
    )
    assert min(facts["unclipped norms"]) > CLIP
    assert facts["weights against torch, unclipped"] < tolerance


def test_an_engine_says_what_updates_and_where(documents):
    said = {name: documents[1][name]["about"] for name in CASES}
    assert said["0"] == "AdamW, ZeRO 0"
    assert said["2, optimizer offloaded"] == "AdamW, ZeRO 2, optimizer on the host"
    assert said["3, muon, all offloaded"] == (
        "Muon for 2 matrices and AdamW for the rest, ZeRO 3, optimizer and weights on the host"
    )


def test_whole_and_shard_are_inverses(facts):
    assert facts["shards"]


def test_shown_weights_are_what_the_forward_reads_and_go_without_a_trace(facts):
    assert facts["shown"] and facts["shown weights"] and facts["showing nothing"]
    assert facts["loss afterwards"] and facts["weights afterwards"]
    assert facts["moments afterwards"] and facts["shards afterwards"]
    assert facts["after an error before"] and facts["after an error inside"]


def test_tensors_to_show_may_lie_on_several_ranks(facts):
    """An error waits for no rank: what others hold stays as it is shown."""
    assert facts["shared out"]


@pytest.mark.parametrize("ranks", [1, 2])
def test_weights_of_a_run_in_bf16_come_back_to_the_last_bit(documents, ranks):
    """They are float32, as their average is, at every stage."""
    assert documents[ranks]["exchanged in bf16"] == [True] * 4


def test_showing_takes_one_tensor_and_no_second_copy(facts):
    """What stays whole under ZeRO-3 is small, and is gathered anew."""
    assert 0 < facts["copies of the largest"] <= (5 if "persistent" in facts["name"] else 1)


def test_the_state_in_another_engine_goes_on_to_the_last_bit(facts):
    """Nothing has been trained there before, and tensors are read and let go one at a time."""
    assert facts["restored weights"] and facts["restored moments"]
    assert facts["restored updates"] == UPDATES
    assert facts["restored loss"]  # what the forward reads, not only what is updated
    assert facts["goes on alike"] and facts["norms that go on alike"]


@pytest.mark.parametrize("ranks, name", ALL)
def test_a_rank_reads_its_share_of_a_state(documents, ranks, name):
    """All weights where it holds them all, which is below ZeRO-3."""
    if name in EIGHT_BIT and not HAS_8_BIT:
        pytest.skip("bitsandbytes is not installed")
    case, near = (CASES | EIGHT_BIT)[name], 0.15  # shares are rounded up, tensors are tiny
    weights, moments = documents[ranks][name]["read"]
    assert weights == pytest.approx(1 / (ranks if case.stage == 3 else 1), abs=near)
    assert moments == pytest.approx(1 / (ranks if case.stage else 1), abs=near)


def test_an_update_that_is_not_finite_is_left_out(facts):
    """Weights and moments stay what they were."""
    assert facts["nan norm"] == ("nan" if facts["name"].startswith("0") else "inf")
    assert facts["nan left out"]
    assert (facts["skipped"], facts["updates after nan"]) == (1, UPDATES + UNCLIPPED)


@pytest.mark.parametrize("ranks", [1, 2])
@pytest.mark.parametrize("kind", CROSSED)
def test_the_state_of_any_stage_goes_on_at_any_other_to_the_last_bit(documents, kind, ranks):
    names = CROSSED[kind]
    expected = {f"{a} -> {b}": True for a in names for b in names}
    assert documents[ranks]["cross"][kind] == expected


@pytest.mark.skipif(not HAS_8_BIT, reason="bitsandbytes is not installed")
def test_moments_of_32_bits_are_rounded_to_8_and_taken_back_as_they_are(documents):
    """Between these two kinds a run may change."""
    found = documents[1]["converted"]
    assert 0 < found["stored"] < 0.02
    assert (found["back"], found["updates"]) == (0, 1)


def test_one_rank_needs_no_launcher_and_agrees_with_itself(documents):
    assert documents[1]["dist"] == {"summed": [1.0, 2.0], "from first": "x", "barrier": None}
    assert documents[2]["dist"] == {"summed": [2.0, 4.0], "from first": "x", "barrier": None}
