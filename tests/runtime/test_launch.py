"""Who a process is follows from any launcher's variables; what cannot be is refused by name."""

import os
import stat

import pytest
import torch

from asymlift.errors import UserError
from asymlift.runtime import dist, launch
from asymlift.runtime.launch import (
    MPICH,
    NUM_LOCAL,
    OPEN_MPI,
    SLURM,
    TASK_LAUNCHERS,
    TORCH,
    USUAL_PORT,
    Ranks,
    expand_nodes,
    meeting_point,
    ranks_in,
    task_launcher,
)

ADDRESS = ("MASTER_ADDR", "MASTER_PORT", "GROUP_WORLD_SIZE", "PMIX_NAMESPACE")
NODES = ("SLURM_STEP_NODELIST", "SLURM_JOB_NODELIST", "SLURM_JOB_ID", "SLURM_STEP_ID")
ALL_NAMES = {
    *(name for launcher in (TORCH, *TASK_LAUNCHERS) for name in launcher.names),
    *NUM_LOCAL.values(),
    *ADDRESS,
    *NODES,
}


def told(launcher: launch.Launcher, *values: int, **more: str) -> dict[str, str]:
    return {**dict(zip(launcher.names, map(str, values), strict=True)), **more}


@pytest.fixture
def environment(monkeypatch) -> dict[str, str]:
    """This process's variables, without those of a launcher."""
    kept = {name: value for name, value in os.environ.items() if name not in ALL_NAMES}
    monkeypatch.setattr(os, "environ", kept)
    return kept


@pytest.fixture
def scontrol(monkeypatch, tmp_path):
    """A program that answers as Slurm's does, for the one question that is asked."""
    program = tmp_path / "scontrol"
    program.write_text('#!/bin/sh\n[ "$1 $2" = "show hostnames" ] && echo "one-of-$3 another"\n')
    program.chmod(program.stat().st_mode | stat.S_IXUSR)
    monkeypatch.setenv("PATH", str(tmp_path))


def test_without_a_launcher_there_is_one_rank(environment):
    assert dist.discover() == dist.discover_tasks() == Ranks(0, 1, 0)
    assert Ranks(0, 1, 0).first and not Ranks(1, 2, 0).first
    assert "RANK" not in environment


def test_torchruns_and_deepspeeds_variables_are_read(environment):
    environment.update(told(TORCH, 5, 8, 1))
    assert dist.discover() == dist.discover_tasks() == Ranks(5, 8, 1)


@pytest.mark.parametrize("launcher", TASK_LAUNCHERS)
def test_what_srun_and_mpirun_say_becomes_what_torch_reads(environment, launcher, monkeypatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    environment.update(told(launcher, 2, 4, 2), SLURM_JOB_NODELIST="gpu7")
    if launcher in NUM_LOCAL:
        environment[NUM_LOCAL[launcher]] = "4"

    assert dist.discover() == Ranks(2, 4, 2)
    assert [environment[name] for name in TORCH.names] == ["2", "4", "2"]
    assert environment["MASTER_ADDR"] == "127.0.0.1" and environment["MASTER_PORT"].isdigit()
    assert dist.discover() == Ranks(2, 4, 2)  # again, by what it has set itself


@pytest.mark.parametrize("launcher", TASK_LAUNCHERS)
def test_work_without_a_process_group_needs_no_address(environment, launcher, monkeypatch):
    environment.update(told(launcher, 2, 4, 2))
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 8)
    assert dist.discover_tasks() == Ranks(2, 4, 2)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)  # bound to the task, or the only one
    assert dist.discover_tasks() == Ranks(2, 4, 0)
    assert "RANK" not in environment
    environment.update(told(TORCH, 4, 5, 3))
    assert dist.discover_tasks() == Ranks(4, 5, 3)


def test_a_slurm_task_that_sees_one_gpu_computes_on_that(environment, monkeypatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    environment.update(told(SLURM, 3, 4, 3))
    assert dist.discover() == Ranks(3, 4, 0) and environment["LOCAL_RANK"] == "0"


def test_one_task_is_a_run_of_its_own(environment):
    """A batch script, an interactive step, and a job of several tasks before any srun."""
    environment.update(told(SLURM, 0, 1, 0), SLURM_NTASKS="8")
    assert dist.discover() == Ranks(0, 1, 0)
    del environment["SLURM_STEP_NUM_TASKS"]
    assert dist.discover() == Ranks(0, 1, 0)


def test_the_innermost_launcher_counts():
    """Inside a job mpirun starts its daemons by srun; srun itself speaks PMI, without a place."""
    daemon, pmi = told(SLURM, 1, 2, 0), {"PMI_RANK": "5", "PMI_SIZE": "8"}
    assert ranks_in(told(OPEN_MPI, 5, 8, 1) | daemon) == Ranks(5, 8, 1)
    assert ranks_in(told(MPICH, 5, 8, 1) | daemon) == Ranks(5, 8, 1)
    assert ranks_in(told(SLURM, 5, 8, 1) | pmi) == Ranks(5, 8, 1)
    with pytest.raises(UserError) as caught:
        ranks_in(pmi)
    assert str(caught.value) == (
        "mpiexec set PMI_RANK=5, PMI_SIZE=8, but not MPI_LOCALRANKID; "
        "start with torchrun, or set all three"
    )


@pytest.mark.parametrize(
    "given, message",
    [
        ({"RANK": "3"}, "the launcher set RANK=3, but not WORLD_SIZE, LOCAL_RANK; start with"),
        ({"WORLD_SIZE": "2", "RANK": "1"}, "set RANK=1, WORLD_SIZE=2, but not LOCAL_RANK; start"),
        (told(TORCH, 2, 2, 0), "RANK=2 is not below WORLD_SIZE=2"),
        (told(TORCH, -1, 2, 0), "RANK=-1 is not below WORLD_SIZE=2"),
        (told(TORCH, 0, 0, 0), "RANK=0 is not below WORLD_SIZE=0"),
        (told(TORCH, 1, 2, 7), "LOCAL_RANK=7 is not below WORLD_SIZE=2"),
        (told(TORCH, 1, 2, 0) | {"RANK": "x"}, "RANK=x is no number; a launcher sets it"),
        (told(SLURM, 4, 4, 0), "SLURM_PROCID=4 is not below SLURM_STEP_NUM_TASKS=4"),
        ({"SLURM_STEP_NUM_TASKS": ""}, "SLURM_STEP_NUM_TASKS= is no number"),
        ({"SLURM_STEP_NUM_TASKS": "2"}, "srun set SLURM_STEP_NUM_TASKS=2, but not SLURM_PROCID"),
        ({"OMPI_COMM_WORLD_SIZE": "2"}, "mpirun set OMPI_COMM_WORLD_SIZE=2, but not OMPI_COMM"),
    ],
)
def test_what_makes_no_sense_is_refused_by_its_name(given, message):
    with pytest.raises(UserError) as caught:
        ranks_in(given)
    assert message in str(caught.value)


@pytest.mark.parametrize("launcher", TASK_LAUNCHERS)
def test_several_tasks_never_become_several_runs(launcher):
    """RANK=0 in a job script, or a torchrun in every task that knows nothing of the others."""
    four = told(launcher, 1, 4, 1)
    with pytest.raises(UserError) as caught:
        ranks_in(four | told(TORCH, 0, 1, 0))
    assert str(caught.value) == (
        f"WORLD_SIZE=1, but {launcher.world}=4: 4 tasks would each be a run of their own.\n"
        "Unset RANK, WORLD_SIZE and LOCAL_RANK, and start again"
    )
    with pytest.raises(UserError) as caught:
        ranks_in(four | told(TORCH, 7, 8, 7, GROUP_WORLD_SIZE="1"))
    assert str(caught.value) == (
        f"{launcher.name} started 4 tasks, each with a torchrun that knows 1: these are separate "
        "runs.\nGive torchrun --nnodes 4 and a --rdzv-endpoint, or unset "
        f"{launcher.world} if separate runs are meant"
    )
    assert ranks_in(four | told(TORCH, 9, 32, 1, GROUP_WORLD_SIZE="4")) == Ranks(9, 32, 1)


def met(environment: dict[str, str]) -> tuple[str | None, str | None]:
    launcher = task_launcher(environment)
    assert launcher is not None
    found = meeting_point(environment, launcher)
    return found.get("MASTER_ADDR"), found.get("MASTER_PORT")


def test_slurms_ranks_meet_on_the_first_node_of_the_step(monkeypatch):
    monkeypatch.setenv("PATH", "")
    task = told(SLURM, 1, 16, 1, SLURM_JOB_ID="4711", SLURM_JOB_NODELIST="node[003-004],gpu1")
    host, port = met(task)
    assert host == "node003" and int(port or 0) in launch.PORTS
    assert met(task | {"SLURM_PROCID": "9", "SLURM_LOCALID": "2"}) == (host, port)
    assert met(task | {"SLURM_JOB_ID": "4712"})[1] != port
    assert met(task | {"SLURM_STEP_ID": "1"})[1] != port
    assert met(task | {"SLURM_STEP_NODELIST": "node004,gpu1"}) == ("node004", port)
    assert met(task | {"SLURM_STEP_NODELIST": "node004"}) == ("127.0.0.1", port)
    assert met(task | {"MASTER_ADDR": "mine", "MASTER_PORT": "7"}) == ("mine", "7")
    assert met(told(SLURM, 0, 2, 0)) == (None, None)


def test_mpis_ranks_meet_here_unless_they_are_elsewhere():
    task = told(OPEN_MPI, 1, 4, 1)
    assert met(task | {"OMPI_COMM_WORLD_LOCAL_SIZE": "4"}) == ("127.0.0.1", str(USUAL_PORT))
    assert met(task | {"OMPI_COMM_WORLD_LOCAL_SIZE": "2"}) == (None, None)
    assert met(task) == (None, None)
    assert met(task | {"MASTER_ADDR": "node1"}) == ("node1", str(USUAL_PORT))
    spaces = [met(task | {"MASTER_ADDR": "a", "PMIX_NAMESPACE": name})[1] for name in ("x", "y")]
    assert all(int(port or 0) in launch.PORTS for port in spaces) and spaces[0] != spaces[1]


def test_scontrol_is_asked_where_there_is_one(scontrol):
    assert launch.host_names("node[1-2]") == ["one-of-node[1-2]", "another"]


@pytest.mark.parametrize(
    "nodes, hosts",
    [
        ("gpu1", ["gpu1"]),
        ("node[003-005,7],gpu1", ["node003", "node004", "node005", "node7", "gpu1"]),
        ("a[08-10]", ["a08", "a09", "a10"]),
        ("r[1-2]n[1-2]x", ["r1n1x", "r1n2x", "r2n1x", "r2n2x"]),
        ("a-b.c,d[5]", ["a-b.c", "d5"]),
    ],
)
def test_lists_of_nodes_are_written_out_without_it(monkeypatch, nodes, hosts):
    monkeypatch.setenv("PATH", "")
    assert expand_nodes(nodes) == launch.host_names(nodes) == hosts


@pytest.mark.parametrize("nodes", ["", "a[1-", "a]1", "a[x]", "a,,b", "a[1-2-3]", "a[-2]", "a[1,]"])
def test_a_list_that_is_none_is_refused(nodes):
    with pytest.raises(UserError, match=r"list of nodes is not understood: .*; set MASTER_ADDR"):
        expand_nodes(nodes)
