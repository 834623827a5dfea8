"""Muon under ZeRO: AdamW, but matrices get momentum made orthogonal.

DeepSpeed's own Muon clips the orthogonal update from stage 1 on, but the gradient at stage 0, and
keeps its momentum in another order at every stage. Here the momentum is an average like AdamW's,
with the same pieces on the same ranks, and gradients are clipped before it.
"""

from collections.abc import Iterator
from typing import Any

import torch
import torch.distributed as td
from torch import Tensor, nn

from asymlift.maths.muon import adamw_scale, orthogonalize
from asymlift.runtime.layout import Layout, Piece


class Muon(torch.optim.AdamW):
    """Special groups hold matrices; `layout` tells what lies where in what they update."""

    layout: Layout

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        groups = self.param_groups
        try:
            self.param_groups = [group for group in groups if not group["special"]]
            if self.param_groups:
                super().step()
        finally:
            self.param_groups = groups
        for group in groups:
            for flat in group["params"] if group["special"] else []:
                if flat.grad is not None:
                    self.step_matrices(flat, group)

    def step_matrices(self, flat: nn.Parameter, group: dict[str, Any]) -> None:
        state, grad, values = self.state[flat], flat.grad, flat.view(-1)
        assert grad is not None
        state["step"] += 1
        momentum = state["momentum"].lerp_(grad, 1 - group["momentum"]).view(-1)
        values.mul_(1 - group["lr"] * group["weight_decay"])

        def ahead(piece: Piece) -> Tensor:
            """Nesterov's look ahead."""
            here = piece.in_flat
            return grad.view(-1)[here].lerp(momentum[here], group["momentum"])

        pieces = list(self.layout.flats[flat].values())
        for piece, update in self.updates(pieces, ahead):
            scale = adamw_scale(*piece.shape)
            mine = update.reshape(-1)[piece.in_whole].to(values)
            values[piece.in_flat].sub_(mine * (group["lr"] * scale))

    def updates(self, pieces: list[Piece], ahead: Any) -> Iterator[tuple[Piece, Tensor]]:
        """The orthogonal update of each matrix, whole; the ranks share the work."""
        layout, world = self.layout, self.layout.ranks.world
        if not layout.shared or world == 1:
            for piece in pieces:
                yield piece, self.orthogonal(layout.spread(piece, ahead(piece)))
            return
        for first in range(0, len(pieces), world):
            turn = pieces[first : first + world]
            own = None
            for owner, piece in enumerate(turn):
                whole = layout.spread(piece, ahead(piece))
                td.reduce(whole, dst=owner)
                if owner == layout.ranks.rank:
                    own = self.orthogonal(whole)
            for owner, piece in enumerate(turn):
                update = own if owner == layout.ranks.rank else self.room(piece)
                assert update is not None
                td.broadcast(update, src=owner)
                yield piece, update

    @property
    def precision(self) -> torch.dtype:
        """Of the iteration: as everywhere on accelerators; CPUs are faster in float32."""
        return torch.float32 if self.layout.device.type == "cpu" else torch.bfloat16

    def orthogonal(self, matrix: Tensor) -> Tensor:
        return orthogonalize(matrix.to(self.precision)).contiguous()

    def room(self, piece: Piece) -> Tensor:
        return torch.empty(piece.shape, dtype=self.precision, device=self.layout.device)
