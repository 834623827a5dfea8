"""Ranks: who else runs this command, and how they agree.

Every stage runs alone or under a launcher (launch.py), with the same command line.
"""

import atexit
import os
import sys
from collections.abc import Callable
from dataclasses import replace
from datetime import timedelta
from typing import Any, NoReturn, TypeVar, cast

import torch
import torch.distributed as td
from torch import Tensor

from asymlift.errors import Exit, Unavailable, UserError
from asymlift.runtime.launch import SLURM, TORCH, meeting_point, ranks_in, task_launcher
from asymlift.runtime.launch import Ranks as Ranks  # to everybody else this is where it lives

T = TypeVar("T")

PATIENCE = 6  # times the timeout that ranks wait while one works alone; the watchdog waits less
talking: td.ProcessGroup | None = None  # what words travel by; None: the one group there is


def discover() -> Ranks:
    """Who this process is; the variables that torch and DeepSpeed read are set if others were."""
    ranks, launcher = ranks_in(os.environ), task_launcher(os.environ)
    if launcher is None or TORCH.rank in os.environ:
        return ranks
    if launcher is SLURM and torch.cuda.device_count() == 1:
        ranks = replace(ranks, local=0)  # --gpus-per-task: each task sees its own GPU alone
    values = (str(value) for value in (ranks.rank, ranks.world, ranks.local))
    os.environ.update(zip(TORCH.names, values, strict=True))
    os.environ.update(meeting_point(os.environ, launcher))
    return ranks


def discover_tasks() -> Ranks:
    """Likewise for work that needs no process group, and so no address."""
    ranks = ranks_in(os.environ)
    if task_launcher(os.environ) is None or TORCH.rank in os.environ:
        return ranks
    # Each may have been given a GPU of its own, or share one: nothing waits for another.
    return replace(ranks, local=ranks.local % max(torch.cuda.device_count(), 1))


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
    backend = "nccl" if device.type == "cuda" else "gloo"
    limit = timedelta(seconds=timeout)
    atexit.register(leave)
    if ranks.world > 1 or "MASTER_ADDR" in os.environ:
        join_others(ranks, backend, limit)
        talk_over_gloo(limit)
        return
    os.environ.update(RANK="0", WORLD_SIZE="1", LOCAL_RANK="0")
    store = td.HashStore()  # type: ignore[attr-defined]
    td.init_process_group(backend, store=store, rank=0, world_size=1, timeout=limit)


def join_others(ranks: Ranks, backend: str, limit: timedelta) -> None:
    for name in ("MASTER_ADDR", "MASTER_PORT"):
        if name not in os.environ:
            raise UserError(
                f"WORLD_SIZE={ranks.world}, but {name} is not set: the ranks cannot find each "
                f"other.\nStart with torchrun, or set it (mpirun: -x {name}=...)"
            )
    try:
        td.init_process_group(backend, timeout=limit)
    except td.DistError as error:
        said = str(error).splitlines()[0][:200]
        raise Unavailable(
            f"rank {ranks.rank} of {ranks.world} could not join the others at "
            f"{os.environ['MASTER_ADDR']}:{os.environ['MASTER_PORT']} ({said}).\n"
            f"All ranks have to start within {limit.total_seconds():.0f} s; if another program "
            "uses the port, set MASTER_PORT"
        ) from error


def talk_over_gloo(limit: timedelta) -> None:
    """A second group, for words between ranks.

    One rank may work alone for longer than a collective of training may take, such as at a folder
    of a million files, and NCCL ends a process whose peers are late.
    """
    global talking
    talking = td.new_group(backend="gloo", timeout=limit * PATIENCE)


def leave() -> None:
    if td.is_initialized():
        td.destroy_process_group()


def end_process(code: int) -> NoReturn:
    """End a process that was one of a group, with this exit code and no other.

    Python ends threads that are inside native code in a way that can abort the process (exit -6),
    and job scripts branch on the code. After a failure the others may be gone: nobody is waited
    for.
    """
    if code == Exit.DONE:
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
        td.broadcast_object_list(box, src=0, group=talking)
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
        td.all_gather_object(box, failure and described(failure), group=talking)
    if failure is not None:
        raise failure
    for said in box:
        if said is not None:
            raise again(said)


def gathered(ranks: Ranks, value: T) -> list[T]:
    """What each rank brings, in the order of ranks, on every rank. Every rank has to call."""
    box: list[Any] = [value] * ranks.world
    if ranks.world > 1:
        td.all_gather_object(box, value, group=talking)
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
