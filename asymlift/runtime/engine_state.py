"""Training state by parameter name, as whole float32 tensors.

It does not depend on the ZeRO stage, on what is offloaded, or on the number of ranks. DeepSpeed's
own checkpoints (pickle, by position) are never used.
"""

import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
import torch.distributed as td
from torch import Tensor

from asymlift.runtime.dist import Ranks
from asymlift.runtime.layout import Layout
from asymlift.runtime.optimizers import (
    OptimizerSettings,
    Read,
    moment_keys,
    read_moment,
    set_step,
    write_moment,
)
from asymlift.runtime.parameters import Trainable, local_shard

NamedTensors = Iterator[tuple[str, Tensor]]


class EngineState:
    """What an engine trains, and what its optimizer remembers, by name."""

    def __init__(
        self,
        trainable: Trainable,
        ranks: Ranks,
        optimizer: torch.optim.Optimizer,
        use: OptimizerSettings,
        layout: Layout,
    ) -> None:
        self.trainable, self.ranks, self.optimizer = trainable, ranks, optimizer
        self.use, self.layout = use, layout

    @property
    def num_updates(self) -> int:
        steps = {int(self.optimizer.state[flat]["step"]) for flat in self.layout.flats}
        assert len(steps) == 1, f"parameters disagree about the step: {sorted(steps)}"
        return steps.pop()

    def shape_of(self, name: str) -> tuple[int, ...]:
        return self.layout.piece(name).shape

    def moment_names(self, name: str) -> list[str]:
        """The moments of a parameter, such as `exp_avg/NAME`."""
        return [f"{key}/{name}" for key in moment_keys(self.use, self.trainable, name)]

    # --- a tensor and its shards ------------------------------------------------------------------

    def whole(self, name: str, shard: Tensor) -> Tensor:
        """A parameter-like tensor from what every rank holds of it. Every rank has to call."""
        parameter: Any = self.trainable.parameters[name]
        if not hasattr(parameter, "ds_shape"):
            return shard.detach()
        shard = shard.to(self.layout.device).contiguous()
        pieces = [torch.empty_like(shard) for _ in range(self.ranks.world)]
        td.all_gather(pieces, shard)
        flat = torch.cat([piece.flatten() for piece in pieces])
        whole = flat[: parameter.ds_numel].view(parameter.ds_shape)
        assert whole.numel() == parameter.ds_numel, name
        return whole

    def held(self, name: str) -> slice:
        """Which stretch of the flattened tensor this rank stores of a parameter."""
        if hasattr(self.trainable.parameters[name], "ds_shape"):
            return self.layout.piece(name).in_whole
        return slice(0, math.prod(self.shape_of(name)))

    @torch.no_grad()
    def fill_shard(self, name: str, shard: Tensor, read: Read) -> None:
        """Overwrite what this rank holds of a parameter-like tensor; the inverse of `whole`."""
        values = read(name, self.held(name))
        flat = shard.view(-1)
        flat[: len(values)].copy_(values)
        flat[len(values) :].zero_()  # padding

    # --- reading ----------------------------------------------------------------------------------

    def weights(self) -> NamedTensors:
        """Every trained tensor, whole, in float32, one at a time. Every rank has to iterate."""
        for name, parameter in self.trainable.parameters.items():
            yield name, self.whole(name, local_shard(parameter)).float()

    def moments(self) -> NamedTensors:
        """What the optimizer remembers, whole, one at a time. Every rank has to iterate."""
        for flat, pieces in self.layout.flats.items():
            state = self.optimizer.state[flat]
            for name, piece in pieces.items():
                for moment in self.moment_names(name):
                    values = read_moment(state, key_of(moment), piece)
                    yield moment, self.layout.gathered(piece, values)

    # --- writing: without collectives, so that a rank can fail alone ------------------------------

    @torch.no_grad()
    def set_weights(self, read: Read) -> None:
        """Overwrite trained weights, in what the next forward reads and in what is updated.

        Of what is sharded a rank reads its share.
        """
        for name, parameter in self.trainable.parameters.items():
            if stays_whole(parameter):
                whole = slice(0, math.prod(self.shape_of(name)))
                parameter.data.view(-1).copy_(read(name, whole))
            local, piece = local_shard(parameter), self.layout.piece(name)
            self.fill_shard(name, local, read)
            begin = piece.begin - self.held(name).start
            updated = local.view(-1)[begin : begin + piece.count]
            self.layout.home[name].view(-1)[piece.in_flat].copy_(updated)

    @torch.no_grad()
    def set_moments(self, read: Read, num_updates: int) -> None:
        """Overwrite what the optimizer remembers. A rank reads what it has pieces of."""
        for flat, pieces in self.layout.flats.items():
            state = self.optimizer.state[flat]
            for key in sorted({key_of(m) for name in pieces for m in self.moment_names(name)}):
                write_moment(state, key, pieces, partial(read_moment_of, read, key))
            set_step(state, num_updates)

    # --- other weights for a while ----------------------------------------------------------------

    @contextmanager
    def showing(
        self, shards: Mapping[str, Tensor], owners: Mapping[str, int] | None = None
    ) -> Iterator[None]:
        """Inside, the next forward reads these weights; what is updated is untouched.

        There is no second copy: `shards` holds the model's own weights meanwhile. What has an owner
        lies in the `shards` of that rank alone, which sends it to the others: every rank has to
        enter and leave. An error ends a run, maybe on one rank alone, so no rank is waited for
        then, and only what is held here is put back.
        """
        owners = owners or {}
        names = [name for name in self.trainable.parameters if name in {**shards, **owners}]
        exchanged: list[str] = []
        try:
            for name in names:
                self.exchange(name, shards)
                exchanged.append(name)
                self.tell(name, owners)
            yield
        except BaseException:
            for name in exchanged:
                self.exchange(name, shards)
            raise
        for name in names:
            self.exchange(name, shards)
            self.tell(name, owners)

    @torch.no_grad()
    def exchange(self, name: str, shards: Mapping[str, Tensor]) -> None:
        """A weight for what lies in `shards`, to the last bit: both are float32."""
        if name in shards:
            weight, other = local_shard(self.trainable.parameters[name]), shards[name]
            assert weight.dtype == other.dtype, f"{name}: {other.dtype} for {weight.dtype}"
            kept = weight.clone()
            weight.copy_(other)
            other.copy_(kept)

    @torch.no_grad()
    def tell(self, name: str, owners: Mapping[str, int]) -> None:
        """Bring a weight to what else holds it: other ranks, and a whole beside the shards."""
        parameter = self.trainable.parameters[name]
        local = local_shard(parameter)
        if name in owners:
            td.broadcast(local, owners[name])
        if stays_whole(parameter):
            parameter.data.copy_(self.whole(name, local))


def key_of(moment: str) -> str:
    return moment.partition("/")[0]


def read_moment_of(read: Read, key: str, name: str, stretch: slice) -> Tensor:
    return read(f"{key}/{name}", stretch)


def stays_whole(parameter: Any) -> bool:
    """Under ZeRO-3 small parameters stay whole between steps, beside their shards."""
    return hasattr(parameter, "ds_shape") and parameter.numel() == parameter.ds_numel
