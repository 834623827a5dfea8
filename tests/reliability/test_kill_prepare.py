"""prepare is killed at its file operations, and its disk fills up; nothing wrong is ever left."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml

from tests.reliability.injector import build, run_under
from tests.stages.prepare.small_prepare import (
    content,
    make_folder,
    recipe_for,
    run,
    shards,
    values_for,
)

needs_gcc = pytest.mark.skipif(shutil.which("gcc") is None, reason="the injector needs gcc")
DRIVER = "tests.reliability.kill_prepare"


@pytest.fixture(scope="module")
def library(tmp_path_factory):
    return build(tmp_path_factory.mktemp("injector"))


@needs_gcc
@pytest.mark.parametrize(("tasks", "every"), [(1, 5), (2, 9)])
def test_killed_anywhere_a_second_run_ends_right_and_keeps_what_was_finished(tasks, every, library):
    found = json.loads(run_under(library, DRIVER, "often", str(every), str(tasks)))
    assert found["problems"] == []
    assert found["points"] > 80  # each file is made, written, flushed and named
    assert found["killed"] >= found["points"] // every
    assert found["shards kept"] > 10


@needs_gcc
@pytest.mark.slow
def test_killed_at_every_operation_a_second_run_ends_right(library):
    found = json.loads(run_under(library, DRIVER, "often", "1", "1"))
    assert found["problems"] == []
    assert found["killed"] == found["points"]


@needs_gcc
def test_killed_twice_the_third_run_ends_right(library):
    found = json.loads(run_under(library, DRIVER, "twice", "8"))
    assert found["problems"] == []
    assert found["codes"]["None"] >= 8


@needs_gcc
def test_a_full_disk_is_said_with_its_place_and_what_is_free(library):
    at = ["1", "6", "18", "25"]  # the plan, a shard, an index, the last files
    for found in json.loads(run_under(library, DRIVER, "fill", *at)):
        assert found["exit"] == 73
        assert "/run/out" in found["message"]
        assert "free here" in found["message"]
        assert found["problem"] == ""  # with space again, the same command succeeds


def test_a_process_that_is_killed_at_any_moment_loses_at_most_its_shard(tmp_path):
    """As a person would: kill -9, a few times, then let it end."""
    make_folder(tmp_path / "source", 60)
    path = tmp_path / "recipe.yaml"
    path.write_text(yaml.safe_dump(values_for(tmp_path, shard_samples=2)))
    out, dice = tmp_path / "out", np.random.default_rng(0)
    for _ in range(2):
        before = {p: p.stat().st_mtime_ns for p in shards(out) if p.with_suffix(INDEX).exists()}
        process = subprocess.Popen(
            [sys.executable, "-m", "asymlift", "prepare", str(path), "-q"],
            cwd=Path(__file__).parents[2],
            env={**os.environ, "OMP_NUM_THREADS": str(torch.get_num_threads())},
        )
        while process.poll() is None and len(shards(out)) < len(before) + 3:
            time.sleep(0.005)
        time.sleep(dice.uniform(0, 0.05))
        process.send_signal(signal.SIGKILL)
        process.wait()
        assert len(shards(out)) > len(before)
        assert before == {p: p.stat().st_mtime_ns for p in before}
    recipe = recipe_for(tmp_path, shard_samples=2)
    assert run(recipe).num_samples == 60
    whole = recipe_for(tmp_path, shard_samples=2, out=str(tmp_path / "whole"))
    run(whole)
    assert content(out) == content(tmp_path / "whole")


INDEX = ".index.safetensors"
