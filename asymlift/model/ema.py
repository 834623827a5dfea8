"""The weight average of what trains, in float32.

The decay is given at every update: a constant, or the one of maths/pace.py whose average weighs
step t with t^gamma (the power-function average of Karras et al. 2024).

Under ZeRO-3 a rank holds a shard of each parameter and averages that shard; nothing is gathered.
At lower stages every rank holds all weights, and so averages all of them or, to take less memory,
its share of the parameters, whole. The average is the same to the last bit.
"""

from collections.abc import Iterator, Mapping
from typing import Literal

import torch
import torch.distributed as td
from torch import Tensor, nn

from asymlift.runtime.dist import Ranks
from asymlift.runtime.parameters import local_shard

LARGE = 1 << 30  # bytes from which `auto` shares the average out


class Ema:
    """The average lives where the weights live; `shards` is what this rank holds of it."""

    def __init__(
        self, parameters: Mapping[str, nn.Parameter], owners: Mapping[str, int], rank: int
    ) -> None:
        self.parameters, self.owners, self.rank = parameters, owners, rank
        self.shards = {
            name: local_shard(parameter).float().clone()
            for name, parameter in parameters.items()
            if owners.get(name, rank) == rank
        }

    @classmethod
    def of(
        cls,
        parameters: Mapping[str, nn.Parameter],
        ranks: Ranks,
        shard: Literal["auto", "always", "never"],
    ) -> "Ema":
        sizes = {name: local_shard(parameter).numel() for name, parameter in parameters.items()}
        large = shard == "always" or (shard == "auto" and 4 * sum(sizes.values()) > LARGE)
        sharded = any(hasattr(parameter, "ds_tensor") for parameter in parameters.values())
        shared = large and not sharded and ranks.world > 1
        owners = shared_out(sizes, ranks.world) if shared else {}
        return cls(parameters, owners, ranks.rank)

    @torch.no_grad()
    def update(self, decay: float) -> None:
        if self.shards:  # with more ranks than parameters, some hold none
            current = [local_shard(self.parameters[name]).float() for name in self.shards]
            torch._foreach_lerp_(list(self.shards.values()), current, 1 - decay)

    @property
    def shown(self) -> "Shown":
        return Shown(self)


class Shown(Mapping[str, Tensor]):
    """What a rank needs to save the average: of every parameter what it holds of the weight.

    One tensor is sent at a time: every rank has to read all of them, in the same order.
    """

    def __init__(self, ema: Ema) -> None:
        self.ema = ema

    def __getitem__(self, name: str) -> Tensor:
        ema = self.ema
        if name not in ema.owners:
            return ema.shards[name]
        weight = local_shard(ema.parameters[name])
        value = ema.shards[name] if name in ema.shards else torch.empty_like(weight).float()
        td.broadcast(value, ema.owners[name])
        return value

    def __iter__(self) -> Iterator[str]:
        return iter(self.ema.parameters)

    def __len__(self) -> int:
        return len(self.ema.parameters)


def shared_out(sizes: Mapping[str, int], world: int) -> dict[str, int]:
    """Which rank averages which parameter: the largest first, each to whoever has least."""
    loads, owners = [0] * world, {}
    for name in sorted(sizes, key=lambda name: (-sizes[name], name)):
        owners[name] = loads.index(min(loads))
        loads[owners[name]] += sizes[name]
    return owners
