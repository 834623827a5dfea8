"""Precision, dtypes and gradients of a velocity field; what it computes is in tests/families."""

import copy
import math
from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn

from asymlift.families import FAMILIES
from asymlift.families.base import matching_modules, trained_in_full
from asymlift.maths.asymmetric import project
from asymlift.maths.schedule import sigma_from_tau
from asymlift.model.checkpointing import checkpoint_blocks
from asymlift.model.float32_maps import float32_maps
from tests.tiny import KINDS, Pair, lifted_pair, tiny_text, tiny_transformer

SIGMA = torch.tensor([0.1, 0.9])


def noisy_tokens(pair: Pair, seed: int = 0) -> Tensor:
    """x_t inside the subspace, where the model as converted predicts nothing outside."""
    g = torch.Generator().manual_seed(seed)
    return torch.randn(2, math.prod(pair.grid), pair.geometry.d, generator=g).to(pair.A) @ pair.A.T


def leak(pair: Pair) -> float:
    """The share of the network's own output that is outside the subspace."""
    outputs: list[Tensor] = []
    pair.pixel.net.get_submodule(pair.pixel.family.last).register_forward_hook(
        lambda module, args, out: outputs.append(out)
    )
    with torch.no_grad():
        u = pair.pixel(noisy_tokens(pair), SIGMA, pair.text, pair.grid, floor=1e-6)
    # Undo the division by sigma, which is the recovery's and would flatter or blame the network.
    u_perp = (u - project(u, pair.A)) * SIGMA.to(u.dtype).view(-1, 1, 1) / pair.s
    return float(u_perp.norm() / u.norm())


@pytest.mark.parametrize(
    ("change", "found"),
    [
        (list, "list"),
        (lambda raw: raw.unsqueeze(2), r"\(2, 4, 1, 8, 12\)"),
        (lambda raw: torch.cat([raw, raw], 1), r"\(2, 8, 8, 12\)"),
    ],
)
def test_a_run_that_returns_no_map_is_our_own_mistake(change, found):
    pair, own = lifted_pair("sd3"), FAMILIES["sd3"].run
    pair.latent.family = replace(FAMILIES["sd3"], run=lambda *given: change(own(*given)))
    z = torch.zeros(2, math.prod(pair.grid), pair.geometry.d).double()
    with pytest.raises(AssertionError, match=f"run of sd3 returned {found}, not a map"):
        pair.latent(z, torch.ones(2).double(), pair.text, pair.grid)


@pytest.mark.parametrize("name", FAMILIES)
def test_bf16_autocast_does_not_leak_into_the_complement(name):
    pair = lifted_pair(name, dtype=torch.float32, precision=torch.bfloat16)
    assert leak(pair) < 1e-6


@pytest.mark.parametrize("name", KINDS)
def test_without_the_float32_last_map_it_does(name):
    pair = lifted_pair(name, dtype=torch.float32, precision=torch.bfloat16)
    pair.pixel.net.get_submodule(FAMILIES[name].last).__class__ = nn.Linear
    assert leak(pair) > 1e-4


@pytest.mark.parametrize("name", FAMILIES)
def test_the_trunk_really_runs_in_bf16(name):
    """Between the two maps nothing is float32 that was not, so bf16 costs what it should."""
    pair = lifted_pair(name, dtype=torch.float32, precision=torch.bfloat16)
    family, net, dtypes = FAMILIES[name], pair.pixel.net, {}
    for path in (family.first, family.last):
        net.get_submodule(path).register_forward_hook(
            lambda module, args, out, path=path: dtypes.update({path: out.dtype})
        )
    x_t = noisy_tokens(pair)
    # Times whose thousandfold bf16 can tell: some classes round them to the type of the trunk.
    sigma = sigma_from_tau(torch.tensor([0.128, 0.512]), pair.s)
    u = pair.pixel(x_t, sigma, pair.text, pair.grid, floor=1e-6).detach()
    assert u.dtype == torch.float32
    assert dtypes == {family.first: torch.bfloat16, family.last: torch.float32}

    exact = lifted_pair(name, dtype=torch.float32)
    wanted = exact.pixel(x_t, sigma, exact.text, exact.grid, floor=1e-6).detach()
    error = float((u - wanted).norm() / wanted.norm())
    assert 1e-4 < error < 0.1  # bf16 has 8 bits


@pytest.mark.parametrize("name", KINDS)
def test_a_mixed_checkpoint_runs_under_autocast(name):
    """As training loads it: bf16 trunk, float32 maps, float32 or bf16 embeddings."""
    pair = lifted_pair(name, dtype=torch.float32, precision=torch.bfloat16)
    family, net = FAMILIES[name], pair.pixel.net
    net.to(torch.bfloat16)
    for path in (family.first, family.last):
        net.get_submodule(path).float()
    outputs = []
    for dtype in (torch.float32, torch.bfloat16):
        text = tiny_text(name, 2, dtype=dtype)
        outputs.append(pair.pixel(noisy_tokens(pair), SIGMA, text, pair.grid, floor=1e-6))
        outputs[-1].square().mean().backward()
        assert outputs[-1].dtype == torch.float32
    assert (outputs[0] - outputs[1]).norm() < 0.05 * outputs[0].norm()
    assert net.get_submodule(family.last).weight.grad.dtype == torch.float32


@pytest.mark.parametrize("name", KINDS)
def test_float32_maps_change_two_modules_and_no_name(name):
    family = FAMILIES[name]
    net = tiny_transformer(name)
    names, stock = list(net.state_dict()), type(net)
    changed = float32_maps(float32_maps(net, family), family)  # again: nothing more happens
    assert changed is net
    assert list(net.state_dict()) == names and type(net) is stock
    odd = [p for p, m in net.named_modules() if "float32_maps" in type(m).__module__]
    assert set(odd) == {*family.first_maps, family.last}
    assert all(isinstance(net.get_submodule(p), nn.Linear | nn.Conv2d) for p in odd)
    fresh = tiny_transformer(name)  # the stock class itself is as it was
    assert type(fresh.get_submodule(family.last)) is nn.Linear
    assert copy.deepcopy(net).get_submodule(family.last).weight.shape


def test_float32_maps_reach_a_wrapped_module():
    """A module that trains is wrapped with its frozen original; both must be exact."""
    family = FAMILIES["flux2"]
    net = tiny_transformer("flux2")
    net.proj_out = nn.Sequential(nn.Linear(32, 16), nn.Identity())
    float32_maps(net, family)
    assert "float32_maps" in type(net.proj_out[0]).__module__


@pytest.mark.parametrize("name", KINDS)
def test_float64_stays_float64(name):
    pair = lifted_pair(name)
    text = tiny_text(name, 2, dtype=torch.float32)  # cast to what the network computes in
    u = pair.pixel(noisy_tokens(pair), SIGMA, text, pair.grid, floor=1e-6)
    v = pair.latent(noisy_tokens(pair) @ pair.A, SIGMA.double(), text, pair.grid)
    assert u.dtype == v.dtype == torch.float64


@pytest.mark.parametrize("name", KINDS)
def test_a_bf16_network_without_autocast_gets_bf16(name):
    pair = lifted_pair(name, dtype=torch.float32)
    pair.pixel.net.to(torch.bfloat16)
    u = pair.pixel(noisy_tokens(pair), SIGMA, pair.text, pair.grid, floor=1e-6)
    assert u.dtype == torch.float32 and u.isfinite().all()


def test_the_algebra_is_float32_inside_a_callers_autocast():
    pair = lifted_pair("flux2", dtype=torch.float32)
    x_t = noisy_tokens(pair)
    with torch.no_grad():
        plain = pair.pixel(x_t, SIGMA, pair.text, pair.grid, floor=1e-6)
        with torch.autocast("cpu", torch.bfloat16):
            inside = pair.pixel(x_t, SIGMA, pair.text, pair.grid, floor=1e-6)
    assert torch.equal(plain, inside)


def test_a_rounded_basis_is_noticed():
    pair = lifted_pair("flux2", dtype=torch.float32)
    with pytest.raises(AssertionError, match=r"A was rounded to torch\.bfloat16"):
        pair.pixel.to(torch.bfloat16)(noisy_tokens(pair), SIGMA, pair.text, pair.grid, floor=1e-6)


def test_the_state_dict_is_the_transformers_own():
    """A and s are stored once, beside the weights, not in every checkpoint."""
    pixel = lifted_pair("sd3").pixel
    assert list(pixel.state_dict()) == [f"net.{name}" for name in pixel.net.state_dict()]


def test_the_floor_bounds_the_complement():
    pair = lifted_pair("flux2")
    g = torch.Generator().manual_seed(1)
    x_t = torch.randn(2, math.prod(pair.grid), pair.geometry.D, generator=g, dtype=torch.float64)
    low, high = (
        pair.pixel(x_t, torch.full((2,), 1e-5), pair.text, pair.grid, floor=floor).detach()
        for floor in (1e-5, 1e-3)
    )
    outside = [u - project(u, pair.A) for u in (low, high)]
    torch.testing.assert_close(outside[0], 100 * outside[1], rtol=1e-5, atol=0)
    torch.testing.assert_close(project(low, pair.A), project(high, pair.A))


@pytest.mark.parametrize("precision", [None, torch.bfloat16])
@pytest.mark.parametrize("name", FAMILIES)
def test_gradient_checkpointing_changes_no_gradient(name, precision):
    def gradients(checkpointing: bool) -> dict[str, Tensor]:
        dtype = torch.float64 if precision is None else torch.float32
        pair = lifted_pair(name, dtype=dtype, precision=precision)
        net = pair.pixel.net.train()
        if checkpointing:
            checkpoint_blocks(net)
        pair.pixel(
            noisy_tokens(pair), SIGMA, pair.text, pair.grid, floor=1e-6
        ).square().mean().backward()
        return {path: p.grad for path, p in net.named_parameters() if p.grad is not None}

    plain, saving = gradients(False), gradients(True)
    assert plain.keys() == saving.keys()
    for path, gradient in plain.items():
        assert torch.equal(gradient, saving[path]), path


@pytest.mark.parametrize("name", FAMILIES)
def test_all_that_a_recipe_trains_gets_a_gradient(name):
    pair = lifted_pair(name, dtype=torch.float32, precision=torch.bfloat16)
    family, net = FAMILIES[name], pair.pixel.net
    g = torch.Generator().manual_seed(1)
    x_t = torch.randn(2, math.prod(pair.grid), pair.geometry.D, generator=g)
    pair.pixel(x_t, SIGMA, pair.text, pair.grid, floor=1e-6).square().mean().backward()
    for path in trained_in_full(family).values():
        for weight in net.get_submodule(path).parameters():
            assert weight.grad is not None and weight.grad.any(), path
    for path in matching_modules(net, family.lora_targets):
        gradient = net.get_submodule(path).weight.grad
        assert gradient is not None and gradient.any(), path
