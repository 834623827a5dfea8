"""Right after the lift, the model in pixels is the latent model seen through the basis."""

from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn

from asymlift.families import FAMILIES
from asymlift.families.base import Family
from asymlift.families.text import without_words
from asymlift.maths.asymmetric import calibrate, project
from tests.families.case import case_of
from tests.tiny import GRID, Pair, lifted_pair, tiny_transformer

SIGMA = (0.23, 0.91)  # one per sample


def relative(got: Tensor, wanted: Tensor) -> float:
    return float((got - wanted).abs().max() / wanted.abs().max())


@torch.no_grad()
def lift_error(pair: Pair) -> float:
    """u against s k v A^T + (1 - s) k x_par + x_perp / sigma, for a random x_t, both models run."""
    A, s, grid = pair.A, pair.s, pair.grid
    g = torch.Generator().manual_seed(0)
    x_t = torch.randn(2, grid[0] * grid[1], len(A), generator=g, dtype=torch.float64).to(A.dtype)
    sigma = torch.tensor(SIGMA, dtype=A.dtype)
    k, tau = calibrate(sigma.view(-1, 1, 1), s)

    u = pair.pixel(x_t, sigma, pair.text, grid, floor=1e-6)

    v = pair.latent(k * x_t @ A, tau.flatten(), pair.text, grid)
    x_par = project(x_t, A)
    wanted = s * k * v @ A.T + (1 - s) * k * x_par + (x_t - x_par) / sigma.view(-1, 1, 1)
    return relative(u, wanted)


@pytest.mark.parametrize(
    ("s", "dtype", "tolerance"),
    [(0.7, torch.float64, 1e-12), (1.9, torch.float64, 1e-12), (0.7, torch.float32, 1e-5)],
)
@pytest.mark.parametrize("name", FAMILIES)
def test_the_lifted_model_is_the_latent_model(name, s, dtype, tolerance):
    error = lift_error(lifted_pair(name, s=s, dtype=dtype))
    assert error <= tolerance, (
        f"off by {error:.1e} of the largest number: order_in or order_out? first, also_first, last?"
    )


@pytest.mark.parametrize("name", [name for name, family in FAMILIES.items() if family.wordless])
def test_the_lifted_network_that_sees_no_words_is_the_latent_one(name):
    pair = lifted_pair(name, net=tiny_transformer(name, seed=7))
    assert lift_error(replace(pair, text=without_words(pair.text))) <= 1e-12


@pytest.mark.parametrize(("name", "usual"), [("flux1", 3.5), ("flux2", 4.0)])
@torch.no_grad()
def test_a_guidance_distilled_model_is_told_its_guidance(name, usual):
    """Its guidance embedding runs, with the pipeline's number unless the text says otherwise."""
    net = tiny_transformer(name, guidance_embeds=True)
    pair = lifted_pair(name, net=net)
    assert lift_error(pair) <= 1e-12

    z, tau = torch.zeros(2, 24, pair.geometry.d).double(), torch.full((2,), 0.5).double()
    silent = pair.latent(z, tau, pair.text, GRID)
    stated, five = (
        pair.latent(z, tau, pair.text | {"guidance": torch.full((2,), g)}, GRID)
        for g in (usual, 5.0)
    )
    assert torch.equal(silent, stated)
    assert relative(five, stated) > 1e-3


def flipped(family: Family, fact: str) -> Family:
    other = "p q c" if getattr(family, fact) == "c p q" else "c p q"
    return replace(family, **{fact: other})


@pytest.mark.parametrize("fact", ["order_in", "order_out"])
@pytest.mark.parametrize("name", FAMILIES)
def test_a_wrong_token_order_breaks_the_identity(name, fact):
    family, net = FAMILIES[name], tiny_transformer(name)
    error = lift_error(lifted_pair(name, family=flipped(family, fact)))
    is_convolution = isinstance(net.get_submodule(family.first), nn.Conv2d)
    if case_of(name).sizes.patch == 1 or (fact == "order_in" and is_convolution):
        assert error <= 1e-12  # one cell a token, or a kernel (n, c, p, q): there is one order
    else:
        assert error > 0.01
