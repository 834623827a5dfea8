"""What trains, by name, and what this rank holds of it."""

import math
from dataclasses import dataclass, field

from torch import Tensor, nn


@dataclass
class Trainable:
    """Names are those of the transformer's own state dict (plus `.lora_A`, `.lora_B`)."""

    parameters: dict[str, nn.Parameter] = field(default_factory=dict)
    roles: dict[str, str] = field(default_factory=dict)
    adapted: list[str] = field(default_factory=list)
    matrices: set[str] = field(default_factory=set)  # inside the blocks: what Muon is for

    @property
    def num_parameters(self) -> int:
        return sum(math.prod(shape_of(p)) for p in self.parameters.values())


def shape_of(parameter: nn.Parameter) -> tuple[int, ...]:
    """Of the whole parameter: under ZeRO-3 its own is empty between steps."""
    return tuple(getattr(parameter, "ds_shape", parameter.shape))


def local_shard(parameter: nn.Parameter) -> Tensor:
    """What this rank stores of a parameter: all of it, or its ZeRO-3 shard."""
    shard: Tensor = getattr(parameter, "ds_tensor", parameter).data
    return shard
