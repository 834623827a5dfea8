"""The same command, alone and under every launcher: the ranks find each other.

torchrun and deepspeed are here; what srun and mpirun tell their tasks is told to real processes.
"""

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from tests.runtime.test_launch import ALL_NAMES

DRIVER = Path(__file__).with_name("drive_launch.py")
BIN = Path(sys.executable).parent
NOT_THERE = f"/nowhere:{BIN}:/usr/bin:/bin"  # no scontrol


def environment(**more: str) -> dict[str, str]:
    kept = {name: value for name, value in os.environ.items() if name not in ALL_NAMES}
    ours = {"PYTHONPATH": str(DRIVER.parents[2]), "OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu"}
    return {**kept, **ours, "PATH": NOT_THERE, **more}


def start(*command: object, **more: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [str(word) for word in command], env=environment(**more), stdout=subprocess.PIPE, text=True
    )


def free_port() -> str:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return str(probe.getsockname()[1])


def srun(rank: int) -> dict[str, str]:
    job = {"SLURM_JOB_ID": str(os.getpid()), "SLURM_STEP_ID": "0", "SLURM_JOB_NODELIST": "this"}
    of = {"SLURM_STEP_NUM_TASKS": "2", "SLURM_NTASKS": "2"}
    return {**job, **of, "SLURM_PROCID": str(rank), "SLURM_LOCALID": str(rank)}


def mpirun(rank: int) -> dict[str, str]:
    of = {"OMPI_COMM_WORLD_SIZE": "2", "OMPI_COMM_WORLD_LOCAL_SIZE": "2"}
    names = ("OMPI_COMM_WORLD_RANK", "OMPI_COMM_WORLD_LOCAL_RANK")
    return {**of, **dict.fromkeys(names, str(rank)), "PMIX_NAMESPACE": f"prterun-{os.getpid()}@1"}


def mpiexec(rank: int) -> dict[str, str]:
    of = {"PMI_SIZE": "2", "MPI_LOCALNRANKS": "2", "MASTER_PORT": MPIEXEC_PORT}
    return {**of, **dict.fromkeys(("PMI_RANK", "MPI_LOCALRANKID"), str(rank))}


MPIEXEC_PORT = free_port()  # without a job's number, two jobs on one machine need to be told apart


@pytest.fixture(scope="module")
def said() -> dict[str, list[dict[str, object]]]:
    """What every process says, by launcher; all at once."""
    torchrun = (BIN / "torchrun", "--standalone", "--nproc-per-node", 2)
    signals = ("--signals-to-handle", "SIGTERM,SIGINT,SIGUSR1")
    deepspeed = (BIN / "deepspeed", "--num_gpus", 2, "--master_port", free_port())
    started = {
        "alone": [start(sys.executable, DRIVER)],
        "torchrun": [start(*torchrun, *signals, "--", DRIVER)],
        "deepspeed": [start(*deepspeed, DRIVER)],
        **{
            tell.__name__: [start(sys.executable, DRIVER, **tell(rank)) for rank in (0, 1)]
            for tell in (srun, mpirun, mpiexec)
        },
    }
    return {name: [word for p in all_of for word in heard(p)] for name, all_of in started.items()}


def heard(process: subprocess.Popen[str]) -> list[dict[str, object]]:
    text, _ = process.communicate(timeout=240)
    assert process.returncode == 0
    lines = [line.partition(" on ")[0] for line in text.splitlines() if line.startswith('{"ranks')]
    return [json.loads(line) for line in lines]


def test_alone_there_is_one(said):
    assert said["alone"] == [{"ranks": [0, 1, 0], "total": 1.0, "torch": [0, 1, 0]}]


@pytest.mark.parametrize("launcher", ["torchrun", "deepspeed", "srun", "mpirun", "mpiexec"])
def test_two_are_two_of_one_run(said, launcher):
    words = sorted(said[launcher], key=lambda word: word["ranks"])
    assert words == [
        {"ranks": [rank, 2, rank], "total": 3.0, "torch": [rank, 2, rank]} for rank in (0, 1)
    ]
