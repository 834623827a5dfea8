"""Optimizers are chosen by kind and device, and say what they need."""

import sys

import pytest
import torch
from torch import nn

from asymlift.errors import BadRecipe, Exit, Unavailable
from asymlift.runtime.optimizers import OptimizerSettings, build_optimizer, is_special
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


def test_without_bitsandbytes_it_says_how_to_get_it(monkeypatch):
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)
    with pytest.raises(Unavailable, match=r'pip install "asymlift\[adamw8bit\]", or use') as said:
        build_optimizer(settings("adamw_8bit"), some(), CPU)
    assert said.value.exit == Exit.UNAVAILABLE
