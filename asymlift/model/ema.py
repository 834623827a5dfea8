"""The weight average of what trains, in float32.

Under ZeRO-3 a rank holds a shard of each parameter and averages that shard; nothing is gathered.
"""

from collections.abc import Mapping

import torch
from torch import nn

from asymlift.runtime.parameters import local_shard


class Ema:
    """The average lives where the weights live; the decay is given at every update."""

    def __init__(self, parameters: Mapping[str, nn.Parameter]) -> None:
        self.parameters = parameters
        self.shards = {name: local_shard(p).float().clone() for name, p in parameters.items()}

    @torch.no_grad()
    def update(self, decay: float) -> None:
        current = [local_shard(p).float() for p in self.parameters.values()]
        torch._foreach_lerp_(list(self.shards.values()), current, 1 - decay)
