"""What a run says when memory runs out: what its rank holds, part by part, and what to change."""

import socket
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn

from asymlift.artifacts.files import human_bytes
from asymlift.model.ema import Ema
from asymlift.recipe import Recipe
from asymlift.runtime import watch
from asymlift.runtime.dist import Ranks
from asymlift.runtime.engine import Engine
from asymlift.runtime.failures import is_out_of_memory, out_of_memory
from asymlift.runtime.parameters import local_shard
from asymlift.stages.plan.memory import alternatives

SUGGESTED = 3


def resident(engine: Engine, ema: Ema | None, module: nn.Module) -> dict[str, int]:
    """Bytes on this rank's device that stay from step to step, by what they are."""
    device = engine.inner.device

    def size(tensors: Iterator[Tensor]) -> int:
        return sum(tensor.nbytes for tensor in tensors if tensor.device.type == device.type)

    trained = set(map(id, engine.trainable.parameters.values()))
    frozen = (local_shard(p) for p in module.parameters() if id(p) not in trained)
    states: list[dict[str, Any]] = list(engine.optimizer.state.values())
    return {
        "frozen weights": size(frozen),
        "trained weights": size(local_shard(p) for p in engine.trainable.parameters.values()),
        "optimizer state": size(
            value for state in states for value in state.values() if isinstance(value, Tensor)
        ),
        "moving average": size(iter(ema.shards.values())) if ema else 0,
    }


def advice(recipe: Recipe, world: int, phase: str) -> str:
    """The cheapest changes, in the order of what they cost; `plan` weighs them."""
    changes = [
        f"--set {key}={value} (costs {cost})"
        for key, value, cost, _ in alternatives(recipe.finetune, world)
    ]
    if "preview" in phase and recipe.sample.batch > 1:
        changes.insert(0, f"--set sample.batch={recipe.sample.batch // 2} (costs nothing)")
    listed = "; ".join(changes[:SUGGESTED]) or "smaller pictures (data.resize)"
    return f"Cheapest changes: {listed}. `asymlift plan` weighs them"


@contextmanager
def explaining_memory(
    recipe: Recipe, ranks: Ranks, parts: Callable[[], Mapping[str, int]]
) -> Iterator[None]:
    """Inside, running out of memory says what was held and what to change."""
    try:
        yield
    except Exception as error:
        if not is_out_of_memory(error):
            raise
        held = ", ".join(f"{name} {human_bytes(count)}" for name, count in parts().items() if count)
        what = f"Of it {held}; the rest passes.\n" if held else ""
        said = f"{what}{advice(recipe, ranks.world, watch.last.phase)}"
        who = f"rank {ranks.rank} ({socket.gethostname()})"
        raise out_of_memory(error, who, said) from error
