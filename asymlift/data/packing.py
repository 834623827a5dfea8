"""Named tensors <-> the bytes that a shard stores of them, a safetensors file.

float8 is e4m3 with one float32 scale per row of the last axis, kept as "NAME.scale"; the largest
of a row becomes 448, the largest that e4m3 holds.
"""

import json
from collections.abc import Mapping
from math import prod
from typing import Literal

import safetensors.torch
import torch
from torch import Tensor

from asymlift.errors import BadData

Dtype = Literal["float32", "float16", "bfloat16", "float8"]

MOST_HEADER = 1 << 20  # bytes: of some tensors; safetensors takes forty times as much to read it

DTYPES: dict[Dtype, torch.dtype] = {
    "float32": torch.float32,
    "float16": torch.float16,
    "bfloat16": torch.bfloat16,
    "float8": torch.float8_e4m3fn,
}
LABELS = {  # as a safetensors header calls them
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.float8_e4m3fn: "F8_E4M3",
}
LARGEST = torch.finfo(torch.float8_e4m3fn).max  # 448
SCALE = ".scale"


def pack(tensors: Mapping[str, Tensor], dtype: Dtype) -> bytes:
    """Floating tensors cast to `dtype`, others as they are; the same bytes every time."""
    packed: dict[str, Tensor] = {}
    for name, tensor in sorted(tensors.items()):
        if not tensor.is_floating_point():
            packed[name] = tensor
        elif dtype == "float8":
            assert name + SCALE not in tensors
            packed[name], packed[name + SCALE] = to_float8(checked(name, tensor, torch.float32))
        else:
            packed[name] = checked(name, tensor, DTYPES[dtype])
    # safetensors refuses tensors that are not contiguous or that share memory.
    whole = {name: x.clone(memory_format=torch.contiguous_format) for name, x in packed.items()}
    data: bytes = safetensors.torch.save(whole)
    return data


def unpack(data: bytes) -> dict[str, Tensor]:
    """float8 as float32, everything else as it is stored; safetensors' own errors pass."""
    if int.from_bytes(data[:8], "little") > MOST_HEADER:
        raise ValueError(f"its header is longer than {MOST_HEADER} bytes")
    stored = safetensors.torch.load(data)
    scales = {
        name: stored.pop(name + SCALE)
        for name, tensor in list(stored.items())
        if tensor.dtype == torch.float8_e4m3fn
    }
    for name, scale in scales.items():
        shape = stored[name].shape
        if scale.shape != (*shape[:-1], 1)[: len(shape)]:  # else it would grow, without a bound
            raise ValueError(f"{name} is {tuple(shape)}, its scales {tuple(scale.shape)}")
    return {
        name: tensor.float() * scales[name] if name in scales else tensor
        for name, tensor in stored.items()
    }


def checked(name: str, tensor: Tensor, dtype: torch.dtype) -> Tensor:
    """Cast; BadData when that gives anything but finite numbers."""
    cast = tensor.to(dtype)
    if cast.isfinite().all():
        return cast
    if not tensor.isfinite().all():
        raise BadData(f"{name} holds values that are not finite")
    kind = str(dtype).removeprefix("torch.")
    largest = float(tensor.abs().max())
    raise BadData(
        f"{name} reaches {largest:.4g}, more than {kind} can hold; bfloat16 and float32 reach 3e38"
    )


def to_float8(tensor: Tensor) -> tuple[Tensor, Tensor]:
    """float32 -> (e4m3, its scales with a last axis of 1)."""
    tiny = torch.finfo(torch.float32).tiny  # rows of zeros stay zeros
    scale = (tensor.abs().amax(-1, keepdim=True) / LARGEST).clamp(min=tiny)
    return (tensor / scale).to(torch.float8_e4m3fn), scale


def packed_size(shapes: Mapping[str, tuple[int, ...]], dtype: Dtype) -> int:
    """Bytes that `pack` will make of floating tensors of these shapes."""
    stored = {name: (DTYPES[dtype], shape) for name, shape in shapes.items()}
    if dtype == "float8":
        for name, shape in shapes.items():
            stored[name + SCALE] = torch.float32, (*shape[:-1], 1)
    end, header = 0, {}
    for name, (kind, shape) in stored.items():
        start, end = end, end + prod(shape) * kind.itemsize
        header[name] = {"dtype": LABELS[kind], "shape": shape, "data_offsets": [start, end]}
    text = json.dumps(header, separators=(",", ":"))
    return 8 + -(-len(text) // 8) * 8 + end
