"""The reference branch stays the converted model, bit for bit, whatever the student learns."""

import math
from contextlib import contextmanager

import pytest
import torch
from torch import Tensor, nn

from asymlift.families import FAMILIES
from asymlift.families.base import trained_in_full
from asymlift.model.checkpointing import checkpoint_blocks
from asymlift.model.loading import keep_float32
from asymlift.model.pixel_flow import PixelFlow
from asymlift.model.reference import Twin, as_reference
from asymlift.model.trainable import Adapters, train_parts
from asymlift.runtime.parameters import Trainable
from tests.tiny import KINDS, Pair, lifted_pair

SIGMA = torch.tensor([0.2, 0.9])
ROLES = ["first", "last", "final_norm"]


def prepared(
    name: str, *, precision: torch.dtype | None = None, keep_originals: bool = True
) -> tuple[Pair, Trainable, Tensor]:
    """A converted model made trainable as a run does it, and what it computed before that."""
    pair = lifted_pair(name, dtype=torch.float32, precision=precision)
    family, net = FAMILIES[name], pair.pixel.net
    if precision is not None:  # as converted and loaded: the maps are float32
        net.to(precision)
        keep_float32(net)
        for path in (family.first, family.last):
            net.get_submodule(path).float()
    before = velocity(pair).detach()
    adapters = Adapters(rank=3, alpha=6.0, dropout=0.5, targets=family.lora_targets)
    trainable = train_parts(
        net, family, adapters=adapters, modules=ROLES, keep_originals=keep_originals, seed=7
    )
    return pair, trainable, before


def noisy_tokens(pair: Pair) -> Tensor:
    g = torch.Generator().manual_seed(0)
    return torch.randn(2, math.prod(pair.grid), pair.geometry.D, generator=g)


def velocity(pair: Pair) -> Tensor:
    return pair.pixel(noisy_tokens(pair), SIGMA, pair.text, pair.grid, floor=1e-4)


def train(pair: Pair, trainable: Trainable, steps: int = 3) -> None:
    """Steps of the optimizer that runs use, large enough that everything moves."""
    optimizer = torch.optim.AdamW(trainable.parameters.values(), lr=0.02, weight_decay=0.1)
    start = {name: p.detach().clone() for name, p in trainable.parameters.items()}
    torch.manual_seed(0)  # dropout
    for _ in range(steps):
        optimizer.zero_grad()
        velocity(pair).square().mean().backward()
        optimizer.step()
    for name, p in trainable.parameters.items():
        assert not torch.equal(p, start[name]), f"{name} did not move"


@contextmanager
def only_the_adapters_off(net: nn.Module):
    """What peft alone offers; the reference of a careless implementation."""
    twins = [module for module in net.modules() if isinstance(module, Twin)]
    with as_reference(net):
        for twin in twins:
            twin.shows_original = False
        yield


@pytest.mark.parametrize("precision", [None, torch.bfloat16])
@pytest.mark.parametrize("name", KINDS)
def test_after_training_the_reference_computes_what_the_converted_model_computed(name, precision):
    pair, trainable, converted = prepared(name, precision=precision)
    train(pair, trainable)

    with as_reference(pair.pixel.net):
        reference = velocity(pair)

    assert torch.equal(reference, converted)
    assert not torch.allclose(velocity(pair), converted, atol=1e-2)


@pytest.mark.parametrize("name", KINDS)
def test_with_only_the_adapters_off_the_reference_drifts(name):
    """The test above sees a missing twin: of all of them, and of each of them."""
    pair, trainable, converted = prepared(name)
    train(pair, trainable)
    with only_the_adapters_off(pair.pixel.net):
        assert not torch.allclose(velocity(pair), converted, atol=1e-2)
    twins = {p: m for p, m in pair.pixel.net.named_modules() if isinstance(m, Twin)}
    assert set(twins) == set(trained_in_full(FAMILIES[name]).values())
    for path, twin in twins.items():
        with as_reference(pair.pixel.net):
            twin.shows_original = False
            assert not torch.equal(velocity(pair), converted), path


def test_a_net_without_twins_drifts():
    pair, trainable, converted = prepared("flux2", keep_originals=False)
    train(pair, trainable)
    with as_reference(pair.pixel.net):
        drifted = velocity(pair)
    assert not torch.allclose(drifted, converted, atol=1e-2)
    assert not drifted.requires_grad  # even where trained weights computed it


@pytest.mark.parametrize("name", KINDS)
def test_afterwards_everything_trains_as_before(name):
    pair, trainable, _ = prepared(name)
    net = pair.pixel.net

    def facts() -> list[tuple[str, bool]]:
        return [(n, p.requires_grad) for n, p in net.named_parameters()]

    before = facts()
    with as_reference(net):
        assert not velocity(pair).requires_grad
    assert facts() == before
    assert {id(p) for p in net.parameters() if p.requires_grad} == {
        id(p) for p in trainable.parameters.values()
    }
    with pytest.raises(RuntimeError, match="stop here"), as_reference(net):
        raise RuntimeError("stop here")
    assert facts() == before and torch.is_grad_enabled()
    assert not any(m.shows_original for m in net.modules() if isinstance(m, Twin))


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("name", KINDS)
def test_the_students_gradient_does_not_notice_the_reference(name, checkpointing):
    """Before its forward, and between its forward and its backward."""

    def gradients(order: str) -> dict[str, Tensor]:
        pair, trainable, _ = prepared(name)
        train(pair, trainable, steps=1)
        if checkpointing:
            checkpoint_blocks(pair.pixel.net)
        for parameter in trainable.parameters.values():
            parameter.grad = None
        if order == "before":
            reference(pair)
        torch.manual_seed(3)  # dropout
        u = velocity(pair)
        if order == "between":
            reference(pair)
        u.square().mean().backward()
        return {n: p.grad.clone() for n, p in trainable.parameters.items()}

    def reference(pair: Pair) -> None:
        with as_reference(pair.pixel.net):
            velocity(pair)

    alone, before, between = gradients("alone"), gradients("before"), gradients("between")
    for path, gradient in alone.items():
        assert gradient.any(), path
        assert torch.equal(gradient, before[path]), path
        assert torch.equal(gradient, between[path]), path


def test_the_reference_has_no_dropout():
    pair, trainable, _ = prepared("flux2")
    train(pair, trainable, steps=1)
    assert not torch.equal(velocity(pair), velocity(pair))
    with as_reference(pair.pixel.net):
        assert torch.equal(velocity(pair), velocity(pair))


def test_a_twin_keeps_its_original_out_of_reach():
    twin = Twin(nn.Linear(2, 2))
    assert all(p.requires_grad for p in twin.trained.parameters())
    assert not any(p.requires_grad for p in twin.original.parameters())
    twin.trained.weight.data.fill_(9)
    assert not (twin.original.weight == 9).any()


def test_a_model_that_trains_in_no_part_is_its_own_reference():
    pair = lifted_pair("sd3", dtype=torch.float32)
    flow: PixelFlow = pair.pixel
    with as_reference(flow.net):
        inside = velocity(pair)
    assert torch.equal(inside, velocity(pair))
