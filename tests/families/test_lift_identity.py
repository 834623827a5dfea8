"""Right after the lift, the model in pixels is the latent model seen through the basis."""

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from asymlift.families import FAMILIES
from asymlift.families.base import Family
from asymlift.maths.asymmetric import calibrate, project
from tests.tiny import GRID, Pair, lifted_pair, tiny_transformer

SIGMA = (0.23, 0.91)  # one per sample


def relative(got: Tensor, wanted: Tensor) -> float:
    return float((got - wanted).abs().max() / wanted.abs().max())


@torch.no_grad()
def lift_error(pair: Pair) -> float:
    """u against s k v A^T + (1 - s) k x_par + x_perp / sigma, for a random x_t, both models run."""
    A, s, num = pair.A, pair.s, GRID[0] * GRID[1]
    g = torch.Generator().manual_seed(0)
    x_t = torch.randn(2, num, len(A), generator=g, dtype=torch.float64).to(A.dtype)
    sigma = torch.tensor(SIGMA, dtype=A.dtype)
    k, tau = calibrate(sigma.view(-1, 1, 1), s)

    u = pair.pixel(x_t, sigma, pair.text, GRID, floor=1e-6)

    v = pair.latent(k * x_t @ A, tau.flatten(), pair.text, GRID)
    x_par = project(x_t, A)
    wanted = s * k * v @ A.T + (1 - s) * k * x_par + (x_t - x_par) / sigma.view(-1, 1, 1)
    return relative(u, wanted)


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.float32, 1e-5)])
@pytest.mark.parametrize("s", [0.7, 1.0, 1.9])
@pytest.mark.parametrize("name", FAMILIES)
def test_the_lifted_model_is_the_latent_model(name, s, dtype, tolerance):
    assert lift_error(lifted_pair(name, s=s, dtype=dtype)) <= tolerance


@torch.no_grad()
def test_flux2_dev_is_told_its_guidance():
    """Its guidance embedding runs, with the pipeline's 4 unless the text says otherwise."""
    net = tiny_transformer("flux2", guidance_embeds=True)
    pair = lifted_pair("flux2", net=net)
    assert lift_error(pair) <= 1e-12

    z, tau = torch.zeros(2, 24, pair.geometry.d).double(), torch.full((2,), 0.5).double()
    silent = pair.latent(z, tau, pair.text, GRID)
    four, five = (
        pair.latent(z, tau, pair.text | {"guidance": torch.full((2,), g)}, GRID) for g in (4.0, 5.0)
    )
    assert torch.equal(silent, four)
    assert relative(five, four) > 1e-3


def flipped(family: Family, fact: str) -> Family:
    other = "p q c" if getattr(family, fact) == "c p q" else "c p q"
    return replace(family, **{fact: other})


@pytest.mark.parametrize("fact", ["order_in", "order_out"])
@pytest.mark.parametrize("name", FAMILIES)
def test_a_wrong_token_order_breaks_the_identity(name, fact):
    error = lift_error(lifted_pair(name, family=flipped(FAMILIES[name], fact)))
    if (name, fact) == ("sd3", "order_in"):
        assert error <= 1e-12  # a convolution's kernel is (n, c, p, q), whatever is declared
    else:
        assert error > 0.1
