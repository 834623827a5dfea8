"""The maps that see pixels compute in float32: a convolution of patches as a matrix product."""

import pytest
import torch
from torch.nn import functional
from torch.testing import assert_close

from asymlift.model.float32_maps import _Float32Conv2d, _map_patches


@pytest.mark.parametrize("size", [(4, 6), (5, 7), (7, 4)])
@pytest.mark.parametrize("kernel", [(2, 2), (1, 1), (2, 3)])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_a_linear_map_of_patches_is_their_convolution(dtype, kernel, size):
    """Of odd sizes too, where the last row and column belong to no patch."""
    x = torch.randn(2, 3, *size, dtype=dtype, requires_grad=True)
    weight = torch.randn(8, 3, *kernel, dtype=dtype, requires_grad=True)
    for bias in (torch.randn(8, dtype=dtype), None):
        ours = _map_patches(x, weight, bias)
        theirs = functional.conv2d(x, weight, bias, stride=kernel)
        assert_close(ours, theirs)
        go = torch.randn_like(ours)
        assert_close(
            torch.autograd.grad(ours, (x, weight), go), torch.autograd.grad(theirs, (x, weight), go)
        )


@pytest.mark.parametrize(
    ("options", "by_convolution"),
    [
        ({"stride": 2}, []),
        ({"stride": 1}, [False]),
        ({"stride": 2, "padding": 1}, [False]),
        ({"stride": 2, "dilation": 2}, [False]),
        ({"stride": 2, "groups": 2}, [False]),
    ],
)
def test_a_float32_convolution_never_uses_tensorfloat32(options, by_convolution, monkeypatch):
    """cuDNN would by default; matrix products do not. Each cuDNN call notes whether it may."""
    conv = torch.nn.Conv2d(4, 8, 2, **options)
    x = torch.randn(2, 4, 7, 6)
    wanted = conv(x)
    conv.__class__, allowed = _Float32Conv2d, []
    real = torch.nn.Conv2d._conv_forward

    def spy(*args):
        allowed.append(torch.backends.cudnn.allow_tf32)
        return real(*args)

    monkeypatch.setattr(torch.nn.Conv2d, "_conv_forward", spy)
    with torch.autocast("cpu", torch.bfloat16):
        assert_close(conv(x), wanted)
    assert allowed == by_convolution
    assert torch.backends.cudnn.enabled and torch.backends.cudnn.allow_tf32
