"""Ranks are what the launcher says; what it cannot mean is refused. Groups: test_engine.py."""

import os
import subprocess
import sys
from itertools import chain

import pytest
import torch

from asymlift.errors import BadData, Exit, UserError
from asymlift.runtime import dist
from asymlift.runtime.dist import Ranks, device_for, discover, first_does, join, summed

NAMES = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")


@pytest.fixture(autouse=True)
def no_launcher(monkeypatch):
    for name in (*NAMES, *chain(*dist.OTHER_LAUNCHERS)):
        monkeypatch.delenv(name, raising=False)


def launched(monkeypatch, *values: str) -> None:
    for name, value in zip(NAMES, values, strict=False):
        monkeypatch.setenv(name, value)


def test_without_a_launcher_there_is_one_rank():
    ranks = discover()
    assert ranks == Ranks(0, 1, 0) and ranks.first


def test_a_launchers_variables_are_read(monkeypatch):
    launched(monkeypatch, "5", "8", "1")
    ranks = discover()
    assert ranks == Ranks(5, 8, 1) and not ranks.first


@pytest.mark.parametrize(
    "values, message",
    [
        (
            ("zero", "2", "0"),
            "the launcher's variables are no numbers: RANK=zero, WORLD_SIZE=2, LOCAL_RANK=0",
        ),
        (
            ("0", ""),
            "the launcher's variables are no numbers: RANK=0, WORLD_SIZE=, LOCAL_RANK=None",
        ),
        (("2", "2"), "RANK=2 is not below WORLD_SIZE=2"),
        (("-1", "2"), "RANK=-1 is not below WORLD_SIZE=2"),
        (("0", "0"), "RANK=0 is not below WORLD_SIZE=0"),
    ],
)
def test_variables_that_make_no_sense_are_refused(monkeypatch, values, message):
    launched(monkeypatch, *values)
    with pytest.raises(UserError) as caught:
        discover()
    assert str(caught.value) == message


def test_several_ranks_need_an_address(monkeypatch):
    monkeypatch.setattr(dist.atexit, "register", lambda call: None)
    with pytest.raises(UserError) as caught:
        join(Ranks(1, 2, 1), torch.device("cpu"), timeout=5)
    assert str(caught.value) == (
        "WORLD_SIZE=2 but MASTER_ADDR is not set; start with torchrun, which sets both"
    )


def test_a_rank_computes_on_its_own_gpu_or_on_the_cpu(monkeypatch):
    chosen = []
    monkeypatch.setattr(torch.cuda, "set_device", chosen.append)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert device_for(Ranks(3, 4, 3)) == torch.device("cpu") and chosen == []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 4)
    assert device_for(Ranks(7, 8, 3)) == torch.device("cuda", 3) and chosen == [3]
    with pytest.raises(UserError, match=r"LOCAL_RANK=4, but this machine shows 4 GPU\(s\)"):
        device_for(Ranks(4, 8, 4))


def test_alone_everything_is_already_agreed_on():
    values = torch.tensor([1.0, 2.0])
    assert summed(values) is values and values.tolist() == [1, 2]
    assert first_does(Ranks(0, 1, 0), lambda: "mine") == "mine"
    dist.barrier()
    dist.leave()


@pytest.mark.parametrize("variable", ["SLURM_STEP_NUM_TASKS", "OMPI_COMM_WORLD_SIZE"])
def test_a_launcher_that_does_not_set_rank_is_refused(monkeypatch, variable):
    """Each of its tasks would take itself for the only one, in the same folder."""
    monkeypatch.setenv(variable, "4")

    with pytest.raises(UserError, match="started 4 tasks, but RANK is not set"):
        dist.discover()
    monkeypatch.setenv("RANK", "0")
    assert dist.discover().world == 1


@pytest.mark.parametrize("names", dist.OTHER_LAUNCHERS)
def test_work_without_a_process_group_takes_its_share_from_any_launcher(monkeypatch, names):
    assert dist.discover_tasks() == Ranks(0, 1, 0)
    for name, value in zip(names, ("2", "4", "2"), strict=True):
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 8)
    assert dist.discover_tasks() == Ranks(2, 4, 2)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)  # bound to the task, or the only one
    assert dist.discover_tasks() == Ranks(2, 4, 0)
    launched(monkeypatch, "1", "3", "0")
    assert dist.discover_tasks() == Ranks(1, 3, 0)


@pytest.mark.parametrize(
    "values, message",
    [
        (("4", "4"), "SLURM_PROCID=4 is not below SLURM_STEP_NUM_TASKS=4"),
        (("x", "4"), "no numbers: SLURM_PROCID=x, SLURM_STEP_NUM_TASKS=4, SLURM_LOCALID=None"),
    ],
)
def test_shares_that_make_no_sense_are_refused_by_their_own_names(monkeypatch, values, message):
    monkeypatch.setenv("SLURM_PROCID", values[0])
    monkeypatch.setenv("SLURM_STEP_NUM_TASKS", values[1])
    with pytest.raises(UserError, match=message):
        dist.discover_tasks()


def test_alone_what_one_rank_does_is_what_all_do():
    alone = dist.Ranks(0, 1, 0)

    def fail() -> None:
        raise BadData("broken")

    assert dist.first_does(alone, lambda: 7) == dist.all_do(alone, lambda: 7) == 7
    for together in (dist.first_does, dist.all_do):
        with pytest.raises(BadData, match="broken"):
            together(alone, fail)
    dist.share_error(alone, None)


def test_an_error_of_another_rank_keeps_its_message_and_its_exit_code():
    error = dist.again(dist.described(BadData("a shard is gone")))

    assert (str(error), error.exit) == ("a shard is gone", Exit.BAD_DATA)


ENDING = """
import sys, threading, time
import torch
from asymlift import cli
from asymlift.runtime import dist

def busy():
    while True:
        torch.randn(300, 300) @ torch.randn(300, 300)

for _ in range(4):
    threading.Thread(target=busy, daemon=True).start()
dist.join(dist.Ranks(0, 1, 0), torch.device("cpu"), 10)

def app():
    print("said")
    sys.exit(65)

cli.app = app
cli.main()
"""


def test_a_process_of_a_group_ends_with_its_own_code_whatever_its_threads_do():
    environment = {k: v for k, v in os.environ.items() if k not in ("RANK", "WORLD_SIZE")}
    done = subprocess.run(
        [sys.executable, "-c", ENDING], env=environment, capture_output=True, text=True
    )
    assert done.stdout == "said\n"
    assert done.returncode == 65  # Python's own way out ends with -6 here
