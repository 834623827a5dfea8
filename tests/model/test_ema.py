"""The weight average is the recurrence on the page, in float32."""

import pytest
import torch
from torch import nn

from asymlift.maths.pace import karras_decay
from asymlift.model.ema import Ema


def parameters(dtype: torch.dtype = torch.float32) -> dict[str, nn.Parameter]:
    g = torch.Generator().manual_seed(0)
    return {
        name: nn.Parameter(torch.randn(shape, generator=g).to(dtype))
        for name, shape in (("a", (3, 4)), ("b", (5,)), ("c", ()))
    }


def test_it_begins_with_the_weights_and_is_no_view_of_them():
    weights = parameters()
    ema = Ema(weights)
    start = {name: p.detach().clone() for name, p in weights.items()}
    for p in weights.values():
        p.data.add_(1)
    for name, average in ema.shards.items():
        assert torch.equal(average, start[name])


@pytest.mark.parametrize("gamma", [7, 1])
def test_it_follows_the_recurrence(gamma):
    """decay * average + (1 - decay) * weight, against float64, over a Karras schedule."""
    weights = parameters()
    ema = Ema(weights)
    exact = {name: p.detach().double() for name, p in weights.items()}
    g = torch.Generator().manual_seed(1)
    for n in range(-2, 30):
        for name, p in weights.items():
            p.data.add_(torch.randn(p.shape, generator=g))
            decay = karras_decay(n, gamma)
            exact[name] = decay * exact[name] + (1 - decay) * p.detach().double()
        ema.update(karras_decay(n, gamma))
    for name, average in ema.shards.items():
        torch.testing.assert_close(average.double(), exact[name], rtol=1e-5, atol=1e-6)


def test_at_decay_zero_it_is_a_copy_to_the_last_bit():
    weights = parameters()
    ema = Ema(weights)
    for p in weights.values():
        p.data.mul_(1e-3).add_(1e3)
    ema.update(0.0)
    for name, p in weights.items():
        assert torch.equal(ema.shards[name], p)


def test_bf16_weights_are_averaged_in_float32():
    """0.9999 in bf16 never moves."""
    weights = {"w": nn.Parameter(torch.full((4,), 0.5, dtype=torch.bfloat16))}
    ema = Ema(weights)
    weights["w"].data.fill_(1.0)
    for _ in range(1000):
        ema.update(0.9999)
    assert ema.shards["w"].dtype == torch.float32
    expected = 1 - 0.5 * 0.9999**1000
    torch.testing.assert_close(ema.shards["w"], torch.full((4,), expected), rtol=1e-4, atol=0)


def test_a_sharded_weight_is_averaged_where_it_lies():
    """Under ZeRO-3 the parameter itself is empty between steps."""
    p = nn.Parameter(torch.empty(0))
    p.ds_tensor = torch.arange(3.0)
    ema = Ema({"w": p})
    p.ds_tensor = torch.tensor([2.0, 3.0, 4.0])
    ema.update(0.5)
    assert torch.equal(ema.shards["w"], torch.tensor([1.0, 2.0, 3.0]))
    assert not ema.shards["w"].requires_grad
