"""The order of training: a pure function of (seed, epoch, sizes), the same for any number of ranks.

A global batch holds pictures of one size. At an epoch's end each size's remainder is padded with
empty slots, so every sample appears exactly once per epoch and every step has the same shape.
"""

import hashlib
from collections.abc import Hashable, Sequence

import torch

EMPTY = -1  # a slot without a sample: it computes, and weighs nothing


def derive(*parts: object) -> int:
    """A 63-bit seed from anything printable; independent draws for independent purposes."""
    digest = hashlib.blake2b("/".join(map(str, parts)).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") >> 1


def generator(*parts: object) -> torch.Generator:
    return torch.Generator().manual_seed(derive(*parts))


class Order:
    """Which samples each step trains on."""

    def __init__(self, sizes: Sequence[Hashable], batch: int, seed: int) -> None:
        self.batch, self.seed = batch, seed
        self.buckets: dict[Hashable, list[int]] = {}
        for index, size in enumerate(sizes):
            self.buckets.setdefault(size, []).append(index)
        self.steps_per_epoch = sum(-(-len(members) // batch) for members in self.buckets.values())
        self._epoch = -1
        self._batches: list[list[int]] = []

    def epoch_of(self, step: int) -> int:
        return step // self.steps_per_epoch

    def slots(self, step: int) -> list[int]:
        """The `batch` sample indices of a step; EMPTY where there is none."""
        epoch = self.epoch_of(step)
        if epoch != self._epoch:
            self._batches = self._plan(epoch)
            self._epoch = epoch
        return self._batches[step % self.steps_per_epoch]

    def _plan(self, epoch: int) -> list[list[int]]:
        draw = generator(self.seed, "order", epoch)
        batches = []
        for members in self.buckets.values():
            shuffled = [members[i] for i in torch.randperm(len(members), generator=draw).tolist()]
            for start in range(0, len(shuffled), self.batch):
                slots = shuffled[start : start + self.batch]
                batches.append(slots + [EMPTY] * (self.batch - len(slots)))
        return [batches[i] for i in torch.randperm(len(batches), generator=draw).tolist()]


def share_of(slots: Sequence[int], rank: int, world: int, micro_batch: int) -> list[range]:
    """The positions that a rank computes, one range per micro-batch.

    Positions are global, so noise and noise level follow the slot, not the rank.
    """
    stride = world * micro_batch
    starts = range(rank * micro_batch, len(slots), stride)
    return [range(start, start + micro_batch) for start in starts]
