"""Optimizers are chosen by kind and device, and say what they need."""

import sys

import pytest
import torch
from torch import nn
from torch.testing import assert_close

from asymlift.errors import BadRecipe, Exit, Unavailable
from asymlift.maths.blockwise import quantize
from asymlift.runtime import optimizers
from asymlift.runtime.dist import Ranks
from asymlift.runtime.layout import Layout, Piece
from asymlift.runtime.muon import Muon
from asymlift.runtime.optimizers import (
    BLOCK,
    OptimizerSettings,
    begin_state,
    build_optimizer,
    check_optimizer,
    is_special,
    read_moment,
    write_moment,
)
from asymlift.runtime.parameters import Trainable

CPU, CUDA = torch.device("cpu"), torch.device("cuda")


def settings(kind):
    return OptimizerSettings(kind, (0.9, 0.95), 1e-8, 0.1, 0.9)


def some(*, matrices=()):
    parameters = {
        "first.weight": nn.Parameter(torch.zeros(70, 70)),
        "blocks.0.weight": nn.Parameter(torch.zeros(70, 70)),
        "blocks.0.bias": nn.Parameter(torch.zeros(70)),
    }
    roles = {"first.weight": "first", "blocks.0.weight": "trunk", "blocks.0.bias": "trunk"}
    return Trainable(parameters, roles, matrices=set(matrices))


def test_adamw_uses_the_fused_kernel_beside_a_gpu_and_foreach_elsewhere():
    beside = build_optimizer(settings("adamw"), some(), CUDA)
    alone = build_optimizer(settings("adamw"), some(), CPU)
    assert (beside.defaults["fused"], alone.defaults["foreach"]) == (True, True)
    assert not alone.defaults["fused"]


@pytest.mark.parametrize("kind", ["adamw", "muon"])
@pytest.mark.parametrize("device", [CPU, CUDA], ids=["foreach", "fused"])
def test_the_state_that_an_engine_begins_with_is_what_the_first_step_would_make(kind, device):
    """The fused kernel runs here too: it is what updates an offloaded optimizer's share."""
    ends = []
    for begins in (False, True):
        trainable = some(matrices=["blocks.0.weight"])
        optimizer = build_optimizer(settings(kind), trainable, device)
        if isinstance(optimizer, Muon):
            ranks = Ranks(0, 1, 0)
            optimizer.layout = Layout(0, None, trainable, ranks, CPU)
        for group in optimizer.param_groups:
            group["lr"] = 0.1
            for parameter in group["params"]:
                parameter.grad = torch.full_like(parameter, 0.5)
                if begins or group["special"]:
                    begin_state(optimizer, group, parameter)
        optimizer.step()
        states = [optimizer.state[p] for p in trainable.parameters.values()]
        ends.append((list(trainable.parameters.values()), states))
    (weights, states), (others, begun) = ends
    assert all(torch.equal(a, b) for a, b in zip(weights, others, strict=True))
    assert_close(begun, states, rtol=0, atol=0)


def test_muon_has_the_matrices_in_groups_of_their_own():
    optimizer = build_optimizer(settings("muon"), some(matrices=["blocks.0.weight"]), CPU)
    told = [(g["role"], g["special"], len(g["params"])) for g in optimizer.param_groups]
    assert told == [("first", False, 1), ("trunk", True, 1), ("trunk", False, 1)]


def test_muon_without_a_matrix_is_refused_with_what_to_do():
    with pytest.raises(
        BadRecipe, match=r"muon is for matrices.*\n.*kind: adamw, train: full"
    ) as said:
        build_optimizer(settings("muon"), some(), CPU)
    assert said.value.exit == Exit.BAD_RECIPE


def test_small_tensors_are_not_stored_in_8_bits():
    trainable = some()
    use = settings("adamw_8bit")
    assert [is_special(use, trainable, name) for name in trainable.parameters] == [
        True,
        True,
        False,
    ]


@pytest.mark.parametrize("at_once", [1, 2, 100])
def test_moments_of_8_bits_are_written_some_blocks_at_once_as_if_all_were(monkeypatch, at_once):
    """Tensors end inside blocks, of one there is only a stretch, the last one is another rank's."""
    monkeypatch.setattr(optimizers, "AT_ONCE", at_once)
    pieces = {
        "a": Piece((300,), 0, 0, 300),
        "b": Piece((9, 200), 300, 700, 900),
        "c": Piece((5,), 1200, 0, 0),
    }
    g = torch.Generator().manual_seed(0)
    moments = {name: torch.randn(piece.shape, generator=g) for name, piece in pieces.items()}
    size, table, most = 1200, torch.linspace(-1, 1, 256), [0]

    def read(name: str, stretch: slice) -> torch.Tensor:
        most[0] = max(most[0], stretch.stop - stretch.start)
        return moments[name].flatten()[stretch]

    state = {
        "state1": torch.zeros(size, dtype=torch.uint8),
        "absmax1": torch.zeros(-(-size // BLOCK)),
        "qmap1": table,
    }
    write_moment(state, "exp_avg", pieces, read)

    together = torch.cat([moments["a"], moments["b"].flatten()[700:1600]])
    codes, scales = quantize(together, table, BLOCK)
    assert torch.equal(state["state1"], codes) and torch.equal(state["absmax1"], scales)
    assert most[0] <= at_once * BLOCK
    assert_close(read_moment(state, "exp_avg", pieces["b"]), together[300:], rtol=0, atol=0.02)


def test_without_bitsandbytes_it_says_how_to_get_it(monkeypatch):
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)
    check_optimizer("adamw")
    with pytest.raises(Unavailable, match="adamw_8bit needs bitsandbytes"):
        check_optimizer("adamw_8bit")
    with pytest.raises(Unavailable, match=r'pip install "asymlift\[adamw8bit\]", or use') as said:
        build_optimizer(settings("adamw_8bit"), some(), CPU)
    assert said.value.exit == Exit.UNAVAILABLE
