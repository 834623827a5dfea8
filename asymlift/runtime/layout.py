"""Where the parameters lie in the flat tensors that ZeRO's optimizers update."""

from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as td
from torch import Tensor, nn

from asymlift.runtime.dist import Ranks
from asymlift.runtime.parameters import Trainable, shape_of

Shape = tuple[int, ...]


@dataclass(frozen=True)
class Piece:
    """What this rank updates of one parameter: a stretch of the flat tensor, and of the whole."""

    shape: Shape  # of the whole parameter
    start: int  # in the flat tensor
    begin: int  # in the whole parameter, flattened
    count: int  # 0: other ranks have it all

    @property
    def in_flat(self) -> slice:
        return slice(self.start, self.start + self.count)

    @property
    def in_whole(self) -> slice:
        return slice(self.begin, self.begin + self.count)


class Layout:
    """Flat tensor -> the pieces of the parameters in it, in the same order on every rank."""

    def __init__(
        self,
        stage: int,
        zero: Any,
        trainable: Trainable,
        ranks: Ranks,
        device: torch.device,
    ) -> None:
        self.shared = stage > 0  # at stage 0 every rank has every piece
        self.ranks, self.device = ranks, device
        names = {id(parameter): name for name, parameter in trainable.parameters.items()}
        self.flats: dict[nn.Parameter, dict[str, Piece]] = {
            flat: {names[id(p)]: piece for p, piece in pieces}
            for flat, pieces in FIND[stage](zero, trainable, ranks)
        }
        self.home = {name: flat for flat, pieces in self.flats.items() for name in pieces}
        assert set(self.home) == set(trainable.parameters)

    def piece(self, name: str) -> Piece:
        return self.flats[self.home[name]][name]

    def spread(self, piece: Piece, values: Tensor) -> Tensor:
        """This rank's piece at its place in the whole, on the device, zero elsewhere."""
        whole = torch.zeros(piece.shape, device=self.device)
        whole.view(-1)[piece.in_whole] = values.to(whole)
        return whole

    def gathered(self, piece: Piece, values: Tensor) -> Tensor:
        """The whole tensor from every rank's piece. Every rank has to call."""
        whole = self.spread(piece, values)
        if self.shared and self.ranks.world > 1:
            td.all_reduce(whole)
        return whole


def find_replicated(zero: Any, trainable: Trainable, ranks: Ranks) -> Any:
    """Stage 0: the parameters themselves."""
    for parameter in trainable.parameters.values():
        yield parameter, [(parameter, Piece(shape_of(parameter), 0, 0, parameter.numel()))]


def find_partitioned(zero: Any, trainable: Trainable, ranks: Ranks) -> Any:
    """Stages 1 and 2: each group is one flat tensor, of which a rank has a stretch."""
    for group, flat in zip(zero.bit16_groups, zero.single_partition_of_fp32_groups, strict=True):
        pieces = []
        for parameter in group:
            piece = Piece(shape_of(parameter), 0, 0, 0)
            if parameter._hp_mapping is not None:
                inner = parameter._hp_mapping.hp_fragment_address
                outer = parameter._hp_mapping.lp_fragment_address
                piece = Piece(piece.shape, inner.start, outer.start, inner.numel)
            pieces.append((parameter, piece))
        yield flat, pieces


def find_sharded(zero: Any, trainable: Trainable, ranks: Ranks) -> Any:
    """Stage 3: a rank has an equal share of every parameter; the last ones are padded."""
    for group, flat in zip(zero.fp16_groups, zero.fp32_partitioned_groups_flat, strict=True):
        pieces = []
        for parameter in group:
            _, start, share = zero.grad_position[zero.get_param_id(parameter)]
            begin = min(ranks.rank * share, parameter.ds_numel)  # past its end there is padding
            count = min(share, parameter.ds_numel - begin)
            pieces.append((parameter, Piece(shape_of(parameter), start, begin, count)))
        yield flat, pieces


FIND = {0: find_replicated, 1: find_partitioned, 2: find_partitioned, 3: find_sharded}
