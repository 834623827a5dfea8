"""What a step tells, the same on one rank and two, and what becomes of updates without a number."""

import json
import math
import os
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

DRIVER, ROOT = Path(__file__).with_name("trainer_checks.py"), Path(__file__).parents[3]
GOOD = (0, 1, 2, 4)  # steps, counted from 0


def run(folder: Path, ranks: int, stages: tuple[str, ...]) -> list[dict[str, Any]]:
    """What each rank found."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    common = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": str(ranks)}
    common |= {"OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu", "PYTHONPATH": str(ROOT)}
    processes = [
        subprocess.Popen(
            [sys.executable, str(DRIVER), str(folder), *stages],
            env={**os.environ, **common, "RANK": str(rank), "LOCAL_RANK": str(rank)},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(ranks)
    ]
    said = [process.communicate(timeout=400) for process in processes]
    assert [process.returncode for process in processes] == [0] * ranks, said
    return [json.loads(out.split("RESULT ")[1]) for out, _ in said]


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("trainer")


@pytest.fixture(scope="module")
def alone(folder):
    return run(folder / "alone", 1, ("0", "2"))[0]


@pytest.fixture(scope="module")
def pair(folder):
    """Rank 1 never needs its reference, which at stage 3 it must run all the same."""
    return run(folder / "pair", 2, ("0", "3"))


def test_a_step_tells_the_same_on_two_ranks_at_any_stage(alone, pair):
    expected = alone["0"]["told"]
    for result in (alone["2"], *(rank[stage] for rank in pair for stage in ("0", "3"))):
        for step in GOOD:
            told = {k: v for k, v in result["told"][step].items() if not k.startswith("seconds")}
            by_sigma = told.pop("loss_by_sigma")
            assert told == pytest.approx(
                {k: v for k, v in expected[step].items() if k in told}, rel=2e-3, abs=1e-6
            )
            assert [v is None for v in by_sigma] == [
                v is None for v in expected[step]["loss_by_sigma"]
            ]


def test_a_request_to_stop_counts_in_the_step_that_it_comes_in(alone, pair):
    """The step may take longer than whoever asks waits."""
    assert alone["0"]["stops"][:4] == [None, None, "SIGTERM", "SIGTERM"]
    for rank, said in zip(pair, ("another rank", "SIGTERM"), strict=True):
        assert rank["3"]["stops"][:4] == [None, None, said, said]


def test_what_a_step_tells(alone):
    for step in GOOD:
        told = alone["0"]["told"][step]
        assert told["skipped_reference"] == 0.5 and "skipped_perceptual" not in told
        assert 0 < told["control"] <= 1 and 0 < told["explained"] < 1
        bins = told["loss_by_sigma"]
        assert [number for number, loss in enumerate(bins) if loss is not None] == [0, 5, 7]
        assert (2 * bins[0] + bins[5] + bins[7]) / 4 == pytest.approx(told["loss"])
        assert told["skipped_updates"] == (0 if step < 3 else 1)
    measured = [step for step, told in enumerate(alone["0"]["told"]) if "gradient_variance" in told]
    assert measured == [1, 3, 5]  # variance_every 2, counted from 1
    told = alone["0"]["told"][1]
    assert told["gradient_variance"] > 0 and told["gradient_snr"] > 0
    assert told["gradient_variance_ratio"] == pytest.approx(
        told["gradient_variance"] / told["gradient_variance_plain"]
    )


def test_an_update_that_is_not_finite_is_left_out_counted_and_written_down(alone, pair, folder):
    """Only one sample of one rank is broken; its partner names it too. Two in a row end the run."""
    results = [alone["0"], alone["2"], *(rank[stage] for rank in pair for stage in ("0", "3"))]
    for result in results:
        told = result["told"]
        assert [step for step, line in enumerate(told) if math.isnan(line["loss"])] == [3, 5]
        assert told[5]["skipped_updates"] == 2 and result["updates"] == 4
        assert "2 updates in a row were not finite" in result["ended"]
        assert "samples 6-0, 6-1, 6-2, 6-3\n" in result["ended"]
    for path in (folder / "alone/0", folder / "alone/2", folder / "pair/0", folder / "pair/3"):
        lines = (path / "logs/not-finite.jsonl").read_text().splitlines()
        written = [json.loads(line) for line in lines]
        assert [line["step"] for line in written] == [4, 6, 7]
        assert written[0]["loss"] == "nan"
        assert written[0]["keys"] == ["3-0", "3-1", "3-2", "3-3"]
