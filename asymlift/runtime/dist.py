"""Ranks: who else runs this command, and how they agree.

Every stage runs alone or under a launcher that sets RANK, WORLD_SIZE and LOCAL_RANK (torchrun,
deepspeed), with the same command line.
"""

import atexit
import os
from dataclasses import dataclass
from datetime import timedelta
from typing import TypeVar

import torch
import torch.distributed as td
from torch import Tensor

from asymlift.errors import UserError

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
    try:
        ranks = Ranks(*(int(os.environ.get(key, default)) for key, default in VARIABLES))
    except ValueError:
        given = ", ".join(f"{key}={os.environ.get(key)}" for key, _ in VARIABLES)
        raise UserError(f"the launcher's variables are no numbers: {given}") from None
    if not 0 <= ranks.rank < ranks.world:
        raise UserError(f"RANK={ranks.rank} is not below WORLD_SIZE={ranks.world}")
    return ranks


VARIABLES = (("RANK", "0"), ("WORLD_SIZE", "1"), ("LOCAL_RANK", "0"))


def device_for(ranks: Ranks) -> torch.device:
    if torch.cuda.is_available():
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


def from_first(ranks: Ranks, value: T | None) -> T:
    """Rank 0's value on every rank."""
    box = [value]
    if ranks.world > 1:
        td.broadcast_object_list(box, src=0)
    result = box[0]
    assert result is not None
    return result


def summed(values: Tensor) -> Tensor:
    """The sum over all ranks, in place."""
    if td.is_initialized() and td.get_world_size() > 1:
        td.all_reduce(values)
    return values


def barrier() -> None:
    if td.is_initialized() and td.get_world_size() > 1:
        td.barrier()
