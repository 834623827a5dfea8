"""The weight average is the recurrence on the page, in float32."""

import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

from asymlift.maths.pace import karras_decay
from asymlift.model import ema as module
from asymlift.model.ema import Ema, shared_out
from asymlift.runtime.dist import Ranks


def parameters(dtype: torch.dtype = torch.float32) -> dict[str, nn.Parameter]:
    g = torch.Generator().manual_seed(0)
    return {
        name: nn.Parameter(torch.randn(shape, generator=g).to(dtype))
        for name, shape in (("a", (3, 4)), ("b", (5,)), ("c", ()))
    }


def average_of(weights: dict[str, nn.Parameter]) -> Ema:
    return Ema.of(weights, Ranks(0, 1, 0), "auto")


def test_it_begins_with_the_weights_and_is_no_view_of_them():
    weights = parameters()
    ema = average_of(weights)
    start = {name: p.detach().clone() for name, p in weights.items()}
    for p in weights.values():
        p.data.add_(1)
    for name, average in ema.shards.items():
        assert torch.equal(average, start[name])


@pytest.mark.parametrize("gamma", [7, 1])
def test_it_follows_the_recurrence(gamma):
    """decay * average + (1 - decay) * weight, against float64, over a Karras schedule."""
    weights = parameters()
    ema = average_of(weights)
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


@pytest.mark.parametrize("gamma", [7, 2.5])
def test_the_karras_decay_weighs_a_step_by_a_power_of_its_number(gamma):
    """The integral of t^gamma over the step: what the power-function average is."""
    steps = 20
    weights = {"w": nn.Parameter(torch.zeros(steps, dtype=torch.float32))}
    ema = average_of(weights)
    for n in range(steps):
        weights["w"].data.zero_()[n] = 1  # one-hot: the average is the list of weights
        ema.update(karras_decay(n, gamma))
    edges = torch.arange(steps + 1, dtype=torch.float64) ** (gamma + 1)
    power = (edges[1:] - edges[:-1]) / edges[-1]
    torch.testing.assert_close(ema.shards["w"].double(), power, rtol=1e-5, atol=1e-9)


def test_at_decay_zero_it_is_a_copy_to_the_last_bit():
    weights = parameters()
    ema = average_of(weights)
    for p in weights.values():
        p.data.mul_(1e-3).add_(1e3)
    ema.update(0.0)
    for name, p in weights.items():
        assert torch.equal(ema.shards[name], p)


def test_bf16_weights_are_averaged_in_float32():
    """0.9999 in bf16 never moves."""
    weights = {"w": nn.Parameter(torch.full((4,), 0.5, dtype=torch.bfloat16))}
    ema = average_of(weights)
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
    ema = Ema.of({"w": p}, Ranks(1, 2, 1), "always")
    p.ds_tensor = torch.tensor([2.0, 3.0, 4.0])
    ema.update(0.5)
    assert torch.equal(ema.shards["w"], torch.tensor([1.0, 2.0, 3.0]))
    assert torch.equal(ema.shown["w"], ema.shards["w"])
    assert not ema.shards["w"].requires_grad


# ---- shared out ----------------------------------------------------------------------------------


def test_every_parameter_has_one_owner_and_loads_are_even():
    """Largest first to whoever has least; the order of the names changes nothing."""
    sizes = {f"p{n}": (n * 7919) % 101 + 1 for n in range(40)}
    for world in (1, 2, 3, 50):
        owners = shared_out(sizes, world)
        loads = [sum(sizes[n] for n in sizes if owners[n] == rank) for rank in range(world)]
        assert owners.keys() == sizes.keys() and set(owners.values()) <= set(range(world))
        assert max(loads) - min(loads) <= max(sizes.values())
        assert shared_out(dict(reversed(sizes.items())), world) == owners


@pytest.mark.parametrize(
    "shard, large, shared",
    [
        ("auto", False, False),
        ("auto", True, True),
        ("always", False, True),
        ("never", True, False),
    ],
)
def test_auto_shares_out_what_is_larger_than_a_gibibyte(monkeypatch, shard, large, shared):
    weights = parameters()
    monkeypatch.setattr(module, "LARGE", 4 * 18 - 1 if large else 4 * 18)  # 18 numbers
    held = [set(Ema.of(weights, Ranks(rank, 2, rank), shard).shards) for rank in (0, 1)]
    assert held == ([{"a"}, {"b", "c"}] if shared else [set(weights)] * 2)


def test_shared_out_it_is_the_same_to_the_last_bit():
    """On two ranks, and on three for two parameters: one of them holds nothing."""
    for world in (2, 3):
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        shared = {"WORLD_SIZE": str(world), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
        running = [
            subprocess.Popen(
                [sys.executable, "-m", "tests.model.ema_checks"],
                cwd=Path(__file__).parents[2],
                env={
                    **os.environ,
                    **shared,
                    "RANK": str(rank),
                    "LOCAL_RANK": str(rank),
                    "OMP_NUM_THREADS": "1",
                },
                stdout=subprocess.PIPE,
                text=True,
            )
            for rank in range(world)
        ]
        said = [process.communicate(timeout=120)[0].strip() for process in running]
        assert said == ["same"] * world
