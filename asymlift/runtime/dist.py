"""Ranks: who else runs this command, and how they agree.

Every stage runs alone or under a launcher that sets RANK, WORLD_SIZE and LOCAL_RANK (torchrun,
deepspeed), with the same command line.
"""

import atexit
import os
import sys
from collections.abc import Callable
from dataclasses import dataclass, replace
from datetime import timedelta
from typing import Any, NoReturn, TypeVar, cast

import torch
import torch.distributed as td
from torch import Tensor

from asymlift.errors import Exit, UserError

T = TypeVar("T")


@dataclass(frozen=True)
class Ranks:
    """This process among all."""

    rank: int
    world: int
    local: int

    @property
    def first(self) -> bool:
        return self.rank == 0


def discover() -> Ranks:
    """Read the launcher's variables; without a launcher there is one rank."""
    ranks = ranks_from(VARIABLES)
    tasks = [os.environ.get(size, "1") for _, size, _ in OTHER_LAUNCHERS]
    if "RANK" not in os.environ and any(count != "1" for count in tasks):
        raise UserError(
            f"a launcher started {max(tasks)} tasks, but RANK is not set: each would run alone. "
            "Start with torchrun, or export RANK, WORLD_SIZE, LOCAL_RANK, MASTER_ADDR, MASTER_PORT"
        )
    return ranks


def discover_tasks() -> Ranks:
    """Likewise for work that needs no process group: what srun and mpirun say is enough."""
    for names in OTHER_LAUNCHERS:
        if "RANK" not in os.environ and os.environ.get(names[1], "1") != "1":
            task = ranks_from(names)
            # Each may have been given a GPU of its own, or share one: nothing waits for another.
            return replace(task, local=task.local % max(torch.cuda.device_count(), 1))
    return discover()


def ranks_from(names: tuple[str, str, str]) -> Ranks:
    """From the variables that say rank, number of ranks and rank on this machine."""
    rank, size, _ = names
    try:
        values = (int(os.environ.get(n, d)) for n, d in zip(names, "010", strict=True))
        ranks = Ranks(*values)
    except ValueError:
        given = ", ".join(f"{name}={os.environ.get(name)}" for name in names)
        raise UserError(f"the launcher's variables are no numbers: {given}") from None
    if not 0 <= ranks.rank < ranks.world:
        raise UserError(f"{rank}={ranks.rank} is not below {size}={ranks.world}")
    return ranks


VARIABLES = ("RANK", "WORLD_SIZE", "LOCAL_RANK")
OTHER_LAUNCHERS = (
    ("SLURM_PROCID", "SLURM_STEP_NUM_TASKS", "SLURM_LOCALID"),
    ("OMPI_COMM_WORLD_RANK", "OMPI_COMM_WORLD_SIZE", "OMPI_COMM_WORLD_LOCAL_RANK"),
)


def device_for(ranks: Ranks) -> torch.device:
    if torch.cuda.is_available():
        if ranks.local >= torch.cuda.device_count():
            raise UserError(
                f"LOCAL_RANK={ranks.local}, but this machine shows {torch.cuda.device_count()} "
                "GPU(s); start as many ranks as there are GPUs"
            )
        torch.cuda.set_device(ranks.local)
        return torch.device("cuda", ranks.local)
    return torch.device("cpu")


def join(ranks: Ranks, device: torch.device, timeout: int) -> None:
    """Join the process group, until the process ends; alone it needs no address and no port.

    Leaving earlier would break DeepSpeed, which keeps the first group it sees.
    """
    if td.is_initialized():
        return
    atexit.register(leave)
    backend = "nccl" if device.type == "cuda" else "gloo"
    limit = timedelta(seconds=timeout)
    if "MASTER_ADDR" in os.environ:
        td.init_process_group(backend, timeout=limit)
        return
    if ranks.world > 1:
        raise UserError(
            f"WORLD_SIZE={ranks.world} but MASTER_ADDR is not set; "
            "start with torchrun, which sets both"
        )
    os.environ.update(RANK="0", WORLD_SIZE="1", LOCAL_RANK="0")
    store = td.HashStore()  # type: ignore[attr-defined]
    td.init_process_group(backend, store=store, rank=0, world_size=1, timeout=limit)


def leave() -> None:
    if td.is_initialized():
        td.destroy_process_group()


def end_process(code: int) -> NoReturn:
    """End a process that was one of a group, with this exit code and no other.

    Python ends threads that are inside native code in a way that can abort the process (exit -6),
    and job scripts branch on the code.
    """
    leave()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def first_does(ranks: Ranks, action: Callable[[], T]) -> T:
    """What rank 0 makes, on every rank; its user error ends every rank alike."""
    result, failure = None, None
    if ranks.first:
        try:
            result = action()
        except UserError as error:
            if ranks.world == 1:
                raise
            failure = error
    box: list[Any] = [(result, failure and described(failure))]
    if ranks.world > 1:
        td.broadcast_object_list(box, src=0)
    made, said = box[0]
    if said is not None:
        raise failure or again(said)
    return cast(T, made)


def all_do(ranks: Ranks, action: Callable[[], T]) -> T:
    """What each rank makes for itself, without collectives; one rank's user error is everyone's."""
    result, failure = None, None
    try:
        result = action()
    except UserError as error:
        failure = error
    share_error(ranks, failure)
    return cast(T, result)


def share_error(ranks: Ranks, failure: UserError | None) -> None:
    """Raise the user error of any rank on all ranks. Every rank has to call."""
    box: list[Any] = [failure and described(failure)]
    if ranks.world > 1:
        box = [None] * ranks.world
        td.all_gather_object(box, failure and described(failure))
    if failure is not None:
        raise failure
    for said in box:
        if said is not None:
            raise again(said)


def gathered(ranks: Ranks, value: T) -> list[T]:
    """What each rank brings, in the order of ranks, on every rank. Every rank has to call."""
    box: list[Any] = [value] * ranks.world
    if ranks.world > 1:
        td.all_gather_object(box, value)
    return box


def described(error: UserError) -> tuple[str, int]:
    return str(error), int(error.exit)


def again(said: tuple[str, int]) -> UserError:
    error = UserError(said[0])
    error.exit = Exit(said[1])
    return error


def summed(values: Tensor) -> Tensor:
    """The sum over all ranks, in place."""
    if td.is_initialized() and td.get_world_size() > 1:
        td.all_reduce(values)
    return values


def barrier() -> None:
    if td.is_initialized() and td.get_world_size() > 1:
        td.barrier()
