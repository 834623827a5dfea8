"""What trains, by name, and what this rank holds of it."""

from dataclasses import dataclass, field

from torch import Tensor, nn


@dataclass
class Trainable:
    """Names are those of the transformer's own state dict (plus `.lora_A`, `.lora_B`)."""

    parameters: dict[str, nn.Parameter] = field(default_factory=dict)
    roles: dict[str, str] = field(default_factory=dict)
    adapted: list[str] = field(default_factory=list)

    @property
    def num_parameters(self) -> int:
        return sum(getattr(p, "ds_numel", p.numel()) for p in self.parameters.values())


def local_shard(parameter: nn.Parameter) -> Tensor:
    """What this rank stores of a parameter: all of it, or its ZeRO-3 shard."""
    shard: Tensor = getattr(parameter, "ds_tensor", parameter).data
    return shard
