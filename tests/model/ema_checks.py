"""Run by test_ema.py as one of several ranks; prints "same" if the shared average is the whole."""

import torch
import torch.distributed as td
from torch import nn

from asymlift.maths.pace import karras_decay
from asymlift.model.ema import Ema
from asymlift.runtime import dist

SHAPES = {2: [(7, 3), (5,), (2, 2), ()], 3: [(4, 2), (3,)]}


def main() -> None:
    ranks = dist.discover()
    td.init_process_group("gloo")
    g = torch.Generator().manual_seed(0)
    weights = {
        f"p{number}": nn.Parameter(torch.randn(shape, generator=g))
        for number, shape in enumerate(SHAPES[ranks.world])
    }
    whole, shared = (Ema.of(weights, ranks, shard) for shard in ("never", "always"))
    for n in range(-1, 9):
        for parameter in weights.values():
            parameter.data.add_(torch.randn(parameter.shape, generator=g))
        for ema in (whole, shared):
            ema.update(karras_decay(n, 7.0))
    held = dist.gathered(ranks, list(shared.shards))
    once = sorted(name for names in held for name in names) == sorted(weights)
    equal = all(torch.equal(value, whole.shards[name]) for name, value in shared.shown.items())
    print("same" if once and equal else (held, equal), flush=True)
    dist.end_process(0)


if __name__ == "__main__":
    main()
