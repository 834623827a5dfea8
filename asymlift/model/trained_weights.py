"""Putting what a run trained into the network that it started from.

LoRA: a module's weight W (out, in) becomes W + alpha / r * B A, with A (r, in) and B (out, r).
"""

from collections.abc import Collection, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from asymlift.errors import BadData

DOWN, UP = ".lora_A.weight", ".lora_B.weight"
SHOWN = 5  # names in a message


@torch.no_grad()
def apply_trained(
    net: nn.Module, tensors: Mapping[str, Tensor], lora: Mapping[str, Any] | None = None
) -> nn.Module:
    """Replace and merge, in place; every tensor must find its place.

    `tensors` have names of the network's state dict, or are pairs `MODULE.lora_A.weight`,
    `MODULE.lora_B.weight`; `lora` is {"rank": r, "alpha": alpha}. What was trained whole stays in
    the dtype it was trained in; an adapted weight is merged in float32 and keeps its own.
    """
    state = net.state_dict()
    adapters = {name: t for name, t in tensors.items() if name.endswith((DOWN, UP))}
    adapted = sorted({name.removesuffix(DOWN).removesuffix(UP) for name in adapters})
    whole = {name: t for name, t in tensors.items() if name not in adapters}

    unknown = sorted(whole.keys() - state.keys())
    unknown += [path for path in adapted if f"{path}.weight" not in state]
    if unknown:
        raise BadData(
            f"trained tensors that {type(net).__name__} does not have: {_some(unknown)}. "
            "Was this checkpoint trained from another model?"
        )
    for name, tensor in whole.items():
        _check_shape(name, tensor, tuple(state[name].shape))
    if adapted and not lora:
        raise BadData(f"adapters without their rank and alpha in state.json: {_some(adapted)}")
    merged = {
        f"{path}.weight": _merge(path, state[f"{path}.weight"], adapters, lora)
        for path in adapted
        if lora
    }
    if twice := sorted(merged.keys() & whole.keys()):
        raise BadData(f"trained both whole and through an adapter: {_some(twice)}")

    placed = {name: t.to(state[name].device) for name, t in (whole | merged).items()}
    net.load_state_dict(placed, strict=False, assign=True)
    return net


def _merge(
    path: str, weight: Tensor, adapters: Mapping[str, Tensor], lora: Mapping[str, Any]
) -> Tensor:
    missing = [name for name in (path + DOWN, path + UP) if name not in adapters]
    if missing:
        raise BadData(f"half an adapter: {missing[0]} is missing")
    rank, alpha = int(lora["rank"]), float(lora["alpha"])
    down, up = adapters[path + DOWN], adapters[path + UP]
    rows, columns = weight.shape
    _check_shape(path + DOWN, down, (rank, columns))
    _check_shape(path + UP, up, (rows, rank))
    change = up.to(weight.device).float() @ down.to(weight.device).float()
    return (weight.float() + alpha / rank * change).to(weight.dtype)


def _check_shape(name: str, tensor: Tensor, wanted: tuple[int, ...]) -> None:
    if tuple(tensor.shape) != wanted:
        raise BadData(
            f"trained tensor {name} is {list(tensor.shape)}, this model needs {list(wanted)}. "
            "Was this checkpoint trained from another model?"
        )


def _some(names: Collection[str]) -> str:
    shown = ", ".join(list(names)[:SHOWN])
    return shown if len(names) <= SHOWN else f"{shown} and {len(names) - SHOWN} more"
