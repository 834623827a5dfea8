"""The two maps that see pixels compute in float32, whatever autocast says.

x (B, C, H, W) is a map that a convolution reads.
"""

import torch
from torch import Tensor, nn
from torch.nn import functional

from asymlift.families.base import Family


class _Float32Linear(nn.Linear):
    """Computes and answers in float32, whatever autocast says."""

    def forward(self, x: Tensor) -> Tensor:
        with torch.autocast(x.device.type, enabled=False):
            bias = None if self.bias is None else self.bias.float()
            return functional.linear(x.float(), self.weight.float(), bias)


class _Float32Conv2d(nn.Conv2d):
    """Likewise. On a GPU a convolution would not: cuDNN takes TensorFloat32 unless told not to."""

    def forward(self, x: Tensor) -> Tensor:
        with torch.autocast(x.device.type, enabled=False):
            bias = None if self.bias is None else self.bias.float()
            if self._maps_patches():
                return _map_patches(x.float(), self.weight.float(), bias)
            with torch.backends.cudnn.flags(enabled=True, allow_tf32=False):
                out: Tensor = self._conv_forward(x.float(), self.weight.float(), bias)
            return out

    def _maps_patches(self) -> bool:
        """Whether it is one linear map of every patch, as the first map of a transformer is."""
        apart = self.kernel_size == self.stride and self.padding == (0, 0)
        return apart and self.dilation == (1, 1) and self.groups == 1


def _map_patches(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """The convolution of x (B, C, H, W) whose stride is its kernel, as a matrix product.

    What is left over at the lower and right edges is dropped, as a convolution drops it.
    """
    ph, pw = weight.shape[2:]
    patches = functional.unfold(x, (ph, pw), stride=(ph, pw)).mT  # (B, h w, C ph pw)
    out = functional.linear(patches, weight.flatten(1), bias).mT
    return out.reshape(len(x), len(weight), x.shape[2] // ph, x.shape[3] // pw)


class _RoundedLinear(_Float32Linear):
    """Computes in float32 and hands on what autocast would have: the trunk stays in bf16."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x).to(_autocast_dtype(x.device.type))


class _RoundedConv2d(_Float32Conv2d):
    """Likewise."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x).to(_autocast_dtype(x.device.type))


def _autocast_dtype(device: str) -> torch.dtype:
    return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else torch.float32


FIRST: dict[type[nn.Module], type[nn.Module]] = {
    nn.Linear: _RoundedLinear,
    nn.Conv2d: _RoundedConv2d,
}
LAST: dict[type[nn.Module], type[nn.Module]] = {nn.Linear: _Float32Linear}


def float32_maps(net: nn.Module, family: Family) -> nn.Module:
    """Make the first and the last map of this network compute in float32 even under autocast.

    In bf16 the last map alone leaks 2e-3 of the velocity into the complement, where it is divided
    by sigma. Only the class of these modules changes: not their names, nor the stock class.
    """
    for path, classes in [(p, FIRST) for p in family.first_maps] + [(family.last, LAST)]:
        for module in net.get_submodule(path).modules():
            module.__class__ = classes.get(type(module), type(module))
    return net
