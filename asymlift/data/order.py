"""The order of training: a pure function of (seed, epoch, sizes), the same for any number of ranks.

A global batch holds pictures of one size. At an epoch's end each size's remainder is padded with
empty slots, so every sample appears exactly once per epoch and every step has the same shape.
"""

import hashlib
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

Ints = NDArray[Any]

# (each size's samples, shuffled; (size, start) of every batch, shuffled)
Plan = tuple[list[Ints], Ints]

EMPTY = -1  # a slot without a sample: it computes, and weighs nothing


def derive(*parts: object) -> int:
    """A 63-bit seed from anything printable; independent draws for independent purposes."""
    digest = hashlib.blake2b("/".join(map(str, parts)).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") >> 1


def generator(*parts: object) -> torch.Generator:
    return torch.Generator().manual_seed(derive(*parts))


class Order:
    """Which samples each step trains on. `sizes` (n, 2): a batch holds samples of one of them."""

    def __init__(self, sizes: Ints, batch: int, seed: int) -> None:
        self.batch, self.seed = batch, seed
        # Ten million samples: 1.5 s; np.unique of pairs takes 15.
        codes = sizes[:, 0].astype(np.int64) << 32 | sizes[:, 1]
        by_size = np.argsort(codes, kind="stable")
        borders = np.flatnonzero(np.diff(codes[by_size])) + 1
        self.members = np.split(by_size, borders)
        self.sizes = sizes[[some[0] for some in self.members]]
        self.steps_per_epoch = sum(-(-len(members) // batch) for members in self.members)
        self._plans: dict[int, Plan] = {}

    def epoch_of(self, step: int) -> int:
        return step // self.steps_per_epoch

    def slots(self, step: int) -> list[int]:
        """The `batch` sample indices of a step; EMPTY where there is none."""
        shuffled, batches = self.plan(self.epoch_of(step))
        which, start = batches[step % self.steps_per_epoch]
        slots: list[int] = shuffled[which][start : start + self.batch].tolist()
        return slots + [EMPTY] * (self.batch - len(slots))

    def size(self, step: int) -> tuple[int, int]:
        """The size of a step's samples."""
        _, batches = self.plan(self.epoch_of(step))
        first, second = self.sizes[batches[step % self.steps_per_epoch, 0]]
        return int(first), int(second)

    def plan(self, epoch: int) -> Plan:
        """Kept for two epochs: near the end of one, steps of the next are asked for."""
        if epoch not in self._plans:
            draw = generator(self.seed, "order", epoch)
            shuffled = [some[permutation(len(some), draw)] for some in self.members]
            batches = np.array(
                [
                    (which, start)
                    for which, some in enumerate(self.members)
                    for start in range(0, len(some), self.batch)
                ]
            )
            last = list(self._plans.items())[-1:]
            self._plans = {
                **dict(last),
                epoch: (shuffled, batches[permutation(len(batches), draw)]),
            }
        return self._plans[epoch]


def permutation(count: int, draw: torch.Generator) -> Ints:
    return torch.randperm(count, generator=draw).numpy()


def share_of(slots: Sequence[int], rank: int, world: int, micro_batch: int) -> list[range]:
    """The positions that a rank computes, one range per micro-batch.

    Positions are global, so noise and noise level follow the slot, not the rank.
    """
    stride = world * micro_batch
    starts = range(rank * micro_batch, len(slots), stride)
    return [range(start, start + micro_batch) for start in starts]
