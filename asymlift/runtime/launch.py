"""What launchers tell each process of several: torchrun and deepspeed, srun, mpirun, mpiexec.

Each speaks through environment variables of its own. Only reading happens here.
"""

import re
import subprocess
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from itertools import product
from zlib import crc32

from asymlift.errors import UserError

Environment = Mapping[str, str]

HERE = "127.0.0.1"
USUAL_PORT = 29500  # torch's own default
NODE = r"(?:\[\d+(?:-\d+)?(?:,\d+(?:-\d+)?)*\]|[^,\[\]])+"  # in Slurm's lists
PORTS = range(20000, 32000)  # below those that Linux hands out by itself


@dataclass(frozen=True)
class Ranks:
    """This process among all."""

    rank: int
    world: int
    local: int

    @property
    def first(self) -> bool:
        return self.rank == 0


@dataclass(frozen=True)
class Launcher:
    """The names of one launcher's variables."""

    name: str
    rank: str
    world: str
    local: str

    @property
    def names(self) -> tuple[str, str, str]:
        return self.rank, self.world, self.local

    def started(self, environment: Environment) -> int:
        """How many tasks it says there are; 0 if it started none."""
        return number(environment, self.world) if self.world in environment else 0

    def ranks(self, environment: Environment) -> Ranks:
        missing = [name for name in self.names if name not in environment]
        given = [f"{name}={environment[name]}" for name in self.names if name in environment]
        if missing:
            raise UserError(
                f"{self.name} set {', '.join(given)}, but not {', '.join(missing)}; "
                "start with torchrun, or set all three"
            )
        rank, world, local = (number(environment, name) for name in self.names)
        if not 0 <= rank < world:
            raise UserError(f"{self.rank}={rank} is not below {self.world}={world}")
        if not 0 <= local < world:
            raise UserError(f"{self.local}={local} is not below {self.world}={world}")
        return Ranks(rank, world, local)


TORCH = Launcher("the launcher", "RANK", "WORLD_SIZE", "LOCAL_RANK")
# Only steps of srun have SLURM_STEP_NUM_TASKS: SLURM_NTASKS is also what a batch script sees, once.
SLURM = Launcher("srun", "SLURM_PROCID", "SLURM_STEP_NUM_TASKS", "SLURM_LOCALID")
OPEN_MPI = Launcher(
    "mpirun", "OMPI_COMM_WORLD_RANK", "OMPI_COMM_WORLD_SIZE", "OMPI_COMM_WORLD_LOCAL_RANK"
)
MPICH = Launcher("mpiexec", "PMI_RANK", "PMI_SIZE", "MPI_LOCALRANKID")
# Innermost first: inside a job, mpirun starts its own daemons through srun, one per node.
TASK_LAUNCHERS = (OPEN_MPI, MPICH, SLURM)
NUM_LOCAL = {OPEN_MPI: "OMPI_COMM_WORLD_LOCAL_SIZE", MPICH: "MPI_LOCALNRANKS"}


def number(environment: Environment, name: str) -> int:
    try:
        return int(environment[name])
    except ValueError:
        raise UserError(f"{name}={environment[name]} is no number; a launcher sets it") from None


def task_launcher(environment: Environment) -> Launcher | None:
    """The launcher, other than torchrun's kind, that started this process as one of several."""
    for launcher in TASK_LAUNCHERS:
        # srun speaks PMI too, then without a rank on the machine.
        by_slurm = launcher is MPICH and launcher.local not in environment
        if launcher.started(environment) > 1 and not (by_slurm and SLURM.started(environment)):
            return launcher
    return None


def ranks_in(environment: Environment) -> Ranks:
    """Who this process is, by whatever started it; without a launcher there is one rank."""
    launcher = task_launcher(environment)
    if TORCH.rank in environment or TORCH.world in environment:
        ranks = TORCH.ranks(environment)
        if launcher is not None:
            check_agreement(environment, ranks, launcher)
        return ranks
    return launcher.ranks(environment) if launcher else Ranks(0, 1, 0)


def check_agreement(environment: Environment, ranks: Ranks, launcher: Launcher) -> None:
    """Refuse several runs that each take themselves for the only one."""
    tasks, groups = launcher.started(environment), "GROUP_WORLD_SIZE"
    if groups in environment:  # torchrun, once per task: it counts its own
        if number(environment, groups) != tasks:
            raise UserError(
                f"{launcher.name} started {tasks} tasks, each with a torchrun that knows "
                f"{environment[groups]}: these are separate runs.\nGive torchrun --nnodes {tasks} "
                f"and a --rdzv-endpoint, or unset {launcher.world} if separate runs are meant"
            )
    elif ranks.world < tasks:
        raise UserError(
            f"WORLD_SIZE={ranks.world}, but {launcher.world}={tasks}: {tasks} tasks would each be "
            "a run of their own.\nUnset RANK, WORLD_SIZE and LOCAL_RANK, and start again"
        )


def meeting_point(environment: Environment, launcher: Launcher) -> dict[str, str]:
    """MASTER_ADDR and MASTER_PORT, as far as they can be known; what is set stays."""
    found = {
        name: environment[name] for name in ("MASTER_ADDR", "MASTER_PORT") if name in environment
    }
    host = found.get("MASTER_ADDR") or first_host(environment, launcher)
    if host is None:
        return found
    return {"MASTER_ADDR": host, "MASTER_PORT": str(port_of(environment, launcher)), **found}


def first_host(environment: Environment, launcher: Launcher) -> str | None:
    """Where rank 0 runs; None if nothing says so."""
    if launcher is SLURM:
        nodes = environment.get("SLURM_STEP_NODELIST") or environment.get("SLURM_JOB_NODELIST")
        hosts = host_names(nodes) if nodes else []
        return HERE if len(hosts) == 1 else next(iter(hosts), None)
    local = NUM_LOCAL[launcher]
    same_machine = local in environment and number(environment, local) == launcher.started(
        environment
    )
    return HERE if same_machine else None


def port_of(environment: Environment, launcher: Launcher) -> int:
    """The same on every rank, another for another job on the same machine."""
    names = ("SLURM_JOB_ID", "SLURM_STEP_ID") if launcher is SLURM else ("PMIX_NAMESPACE",)
    job = ".".join(environment[name] for name in names if name in environment)
    return PORTS[crc32(job.encode()) % len(PORTS)] if job else USUAL_PORT


def host_names(nodes: str) -> list[str]:
    """Slurm's list of nodes, written out."""
    try:
        done = subprocess.run(
            ["scontrol", "show", "hostnames", nodes], capture_output=True, text=True, timeout=20
        )
    except (OSError, subprocess.TimeoutExpired):
        return expand_nodes(nodes)
    return done.stdout.split() if done.returncode == 0 else expand_nodes(nodes)


def expand_nodes(nodes: str) -> list[str]:
    """'a[1-2,05],b' -> a1, a2, a05, b: what scontrol does, where there is none."""
    parts = re.findall(NODE, nodes)
    if not parts or ",".join(parts) != nodes:
        raise UserError(
            f"Slurm's list of nodes is not understood: {nodes}; "
            "set MASTER_ADDR to the name of the first node"
        )
    hosts = []
    for part in parts:
        pieces = [
            list(numbers(piece[1:-1])) if piece.startswith("[") else [piece]
            for piece in re.findall(r"\[[^\]]*\]|[^\[]+", part)
        ]
        hosts += ["".join(chosen) for chosen in product(*pieces)]
    return hosts


def numbers(ranges: str) -> Iterator[str]:
    """'08-10,3' -> 08, 09, 10, 3."""
    for piece in ranges.split(","):
        first, _, last = piece.partition("-")
        for value in range(int(first), int(last or first) + 1):
            yield str(value).zfill(len(first))
