"""Operations on a CPU's fake tensors that hold the memory which they would hold on a GPU.

Three things differ: attention is one kernel that keeps a number per query instead of the scores,
so is the root-mean-square norm, and autocast sends other operations to float32.
"""

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional
from torch.overrides import TorchFunctionMode

from asymlift.maths.zero_memory import Device

# Of CUDA's autocast list those that the CPU's leaves in the lower precision.
IN_FLOAT32 = {
    torch.pow,
    Tensor.pow,
    Tensor.__pow__,
    torch.exp,
    torch.log,
    torch.rsqrt,
    Tensor.rsqrt,
    torch.reciprocal,
    torch.softmax,
    Tensor.softmax,
    functional.softmax,
    functional.softplus,
    functional.layer_norm,
    functional.group_norm,
    functional.interpolate,
    functional.mse_loss,
}


class LikeCuda(TorchFunctionMode):
    """Inside, memory is used as on the device; for a CPU nothing has to change."""

    def __init__(self, device: Device) -> None:
        super().__init__()
        self.active = device == "cuda"

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        if not self.active:
            return func(*args, **kwargs)
        if func is functional.scaled_dot_product_attention:
            return attention(*args, **kwargs)
        lower = torch.is_autocast_enabled("cpu")
        if func is functional.rms_norm:
            return rms_norm(*args, **kwargs, lower=lower)
        if lower and func in IN_FLOAT32:
            args = tuple(in_float32(value) for value in args)
        return func(*args, **kwargs)


def in_float32(value: Any) -> Any:
    low = isinstance(value, Tensor) and value.dtype in (torch.bfloat16, torch.float16)
    return value.float() if low else value


def attention(query: Tensor, key: Tensor, value: Tensor, *_: Any, **__: Any) -> Tensor:
    if torch.is_autocast_enabled("cpu"):
        dtype = torch.get_autocast_dtype("cpu")
        query, key, value = query.to(dtype), key.to(dtype), value.to(dtype)
    out: Tensor = Attention.apply(query, key, value)  # type: ignore[no-untyped-call]
    return out


class Attention(torch.autograd.Function):
    """Flash and memory-efficient attention: the scores are never there as a whole."""

    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        out = torch.empty_like(query)
        sums = query.new_empty(query.shape[:-1], dtype=torch.float32)
        ctx.save_for_backward(query, key, value, out, sums)
        return out

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Any:
        query, key, value, _, sums = ctx.saved_tensors
        summed = query.new_empty(query.shape, dtype=torch.float32)  # the gradient of the queries
        dots = torch.empty_like(sums)
        made = tuple(torch.empty_like(one) for one in (query, key, value))
        del summed, dots
        return made


def rms_norm(
    x: Tensor,
    normalized_shape: Any,
    weight: Tensor | None = None,
    eps: float | None = None,
    *,
    lower: bool,
) -> Tensor:
    if lower:
        x, weight = in_float32(x), in_float32(weight)
    out: Tensor = RmsNorm.apply(x, weight)  # type: ignore[no-untyped-call]
    return out


class RmsNorm(torch.autograd.Function):
    """One kernel: it keeps its input and one number per row."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor | None) -> Tensor:
        ctx.save_for_backward(x, weight, x.new_empty((*x.shape[:-1], 1), dtype=torch.float32))
        return torch.empty_like(x)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Any:
        x, weight, _ = ctx.saved_tensors
        return torch.empty_like(x), None if weight is None else torch.empty_like(weight)
