"""The optimizers, and how each keeps its moments.

Moments are read and written as float32 stretches of a flat tensor, however they are stored.
"""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from asymlift.errors import BadRecipe, Unavailable
from asymlift.maths.blockwise import dequantize, quantize
from asymlift.runtime.layout import Piece
from asymlift.runtime.muon import Muon
from asymlift.runtime.parameters import Trainable, shape_of

Read = Callable[[str, slice], Tensor]  # a stretch of a flattened tensor of a file, by name
Kind = Literal["adamw", "adamw_8bit", "muon"]
ADAMW, MUON = ("exp_avg", "exp_avg_sq"), ("momentum",)

BLOCK = 256  # numbers that share a scale, in bitsandbytes
SMALLEST_8BIT = 4096  # numbers; its own limit for a tensor
AT_ONCE = 1 << 16  # blocks that are quantised at once
STORED = {"exp_avg": "1", "exp_avg_sq": "2"}  # what it calls them: state1, absmax1, qmap1


@dataclass(frozen=True)
class OptimizerSettings:
    """What an optimizer needs to know; learning rates are set at every step."""

    kind: Kind
    betas: tuple[float, float]
    eps: float
    weight_decay: float
    momentum: float  # of Muon's matrices


def build_optimizer(
    use: OptimizerSettings, trainable: Trainable, device: torch.device
) -> torch.optim.Optimizer:
    """One group of parameters per role; those that a kind treats apart have their own."""
    groups: dict[tuple[str, bool], list[nn.Parameter]] = {}
    for name, parameter in trainable.parameters.items():
        key = (trainable.roles[name], is_special(use, trainable, name))
        groups.setdefault(key, []).append(parameter)
    if use.kind == "muon" and not any(special for _, special in groups):
        raise BadRecipe(
            "finetune.optimizer.kind: muon is for matrices inside the transformer's blocks, and "
            "none of them trains in full (adapters, the first and the last map take AdamW);\n"
            "use kind: adamw, train: full, or name modules of blocks in train.modules"
        )
    listed = [
        {"params": parameters, "role": role, "special": special, "momentum": use.momentum}
        for (role, special), parameters in groups.items()
    ]
    common: dict[str, Any] = {
        "lr": 0.0,
        "betas": use.betas,
        "eps": use.eps,
        "weight_decay": use.weight_decay,
    }
    if use.kind == "adamw_8bit":
        eight_bit: torch.optim.Optimizer = import_bitsandbytes().optim.AdamW8bit(listed, **common)
        return eight_bit
    # The fused kernel on a CPU is 7 times as fast as `foreach`, but rounds by position (1 ulp), so
    # that runs at other ZeRO stages would differ. Beside a GPU the host's share has to be fast.
    common["fused" if device.type == "cuda" else "foreach"] = True
    return (Muon if use.kind == "muon" else torch.optim.AdamW)(listed, **common)


def is_special(use: OptimizerSettings, trainable: Trainable, name: str) -> bool:
    """Muon's matrices; or what is stored in 8 bits: small tensors would spoil their neighbours."""
    if use.kind == "muon":
        return name in trainable.matrices
    size = math.prod(shape_of(trainable.parameters[name]))
    return use.kind == "adamw_8bit" and size >= SMALLEST_8BIT


def check_optimizer(kind: Kind) -> None:
    """Refuse what is not installed, before a large model is loaded."""
    if kind == "adamw_8bit":
        import_bitsandbytes()


def import_bitsandbytes() -> Any:
    try:
        import bitsandbytes
    except ImportError as error:
        raise Unavailable(
            f"finetune.optimizer.kind: adamw_8bit needs bitsandbytes ({error});\n"
            'run: pip install "asymlift[adamw8bit]", or use kind: adamw'
        ) from None
    return bitsandbytes


# --- moments ----------------------------------------------------------------------------------


def moment_keys(use: OptimizerSettings, trainable: Trainable, name: str) -> tuple[str, ...]:
    """What the optimizer remembers of a parameter."""
    return MUON if use.kind == "muon" and is_special(use, trainable, name) else ADAMW


def begin_state(optimizer: Any, group: dict[str, Any], flat: nn.Parameter) -> None:
    """Make the state that the first step would make."""
    state, special = optimizer.state[flat], group["special"]
    if isinstance(optimizer, torch.optim.AdamW):
        on_device = flat.device if group["fused"] else None
        state["step"] = torch.zeros((), dtype=torch.float32, device=on_device)
        for key in MUON if special else ADAMW:
            state[key] = torch.zeros_like(flat, requires_grad=False)
    elif special:
        # It looks up settings by the tensor's place in a group, and ZeRO leaves groups empty.
        groups, optimizer.param_groups = optimizer.param_groups, [{**group, "params": [flat]}]
        optimizer.init_state(group, flat, 0, 0)
        optimizer.param_groups = groups
    else:
        state["step"] = 0
        for number in STORED.values():
            state[f"state{number}"] = torch.zeros_like(flat, requires_grad=False)


def set_step(state: dict[str, Any], step: int) -> None:
    if isinstance(state["step"], Tensor):
        state["step"].fill_(step)
    else:
        state["step"] = step


def read_moment(state: Mapping[str, Any], key: str, piece: Piece) -> Tensor:
    """This rank's piece of a moment, flat, in float32."""
    stored = stored_moment(state, key)
    if stored.dtype == torch.float32:
        return stored[piece.in_flat]
    first, last = piece.start // BLOCK, -(-(piece.start + piece.count) // BLOCK)
    values = dequantize(
        stored[first * BLOCK : last * BLOCK],
        state[f"absmax{STORED[key]}"][first:last],
        state[f"qmap{STORED[key]}"],
        BLOCK,
    )
    offset = piece.start - first * BLOCK
    return values[offset : offset + piece.count]


def stored_moment(state: Mapping[str, Any], key: str) -> Tensor:
    """As the optimizer keeps it, flat. bitsandbytes keeps small tensors in float32."""
    stored: Tensor = state[key] if key in state else state[f"state{STORED[key]}"]
    return stored.view(-1)


def write_moment(
    state: Mapping[str, Any], key: str, pieces: Mapping[str, Piece], read: Read
) -> None:
    """Overwrite this rank's pieces of a moment. Of those of 8 bits, so many blocks at once."""
    stored = stored_moment(state, key)
    if stored.dtype == torch.float32:
        for name, piece in pieces.items():
            if piece.count:
                stored[piece.in_flat].copy_(read(name, piece.in_whole))
        return
    scales, table = state[f"absmax{STORED[key]}"], state[f"qmap{STORED[key]}"]
    for first in range(0, len(scales), AT_ONCE):
        blocks = slice(first, first + AT_ONCE)
        begin, end = first * BLOCK, min((first + AT_ONCE) * BLOCK, stored.numel())
        values = torch.zeros(end - begin, device=stored.device)
        for name, piece in pieces.items():
            start, stop = max(begin, piece.start), min(end, piece.in_flat.stop)
            if start < stop:
                shift = piece.begin - piece.start
                part = values[start - begin : stop - begin]
                part.copy_(read(name, slice(start + shift, stop + shift)))
        stored[begin:end], scales[blocks] = quantize(values, table, BLOCK)
