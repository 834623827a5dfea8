"""Tiny random models of the real classes, so that every claim is tested on the code that ships.

Mostly a latent has 4 channels and is 4 times smaller than its picture, and a token is 2 x 2 latent
cells: p = 8, d = 16, D = 192, C' = 48 (see families/case.py). Nothing here is downloaded.
"""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from asymlift.artifacts.diffusers_folder import pipeline_index
from asymlift.families import FAMILIES
from asymlift.families.base import Family, Geometry, Text
from asymlift.maths.lift import lift_first, lift_last
from asymlift.model.pixel_flow import LatentFlow, PixelFlow
from asymlift.runtime import third_party
from tests.families.case import case_of, seeded

GRID = (4, 6)  # tokens of a picture of 32 x 48 pixels
# One family of each kind, for what does not depend on more: packed tokens without and with a mask,
# a map read by a convolution, lists of unlike lengths.
KINDS = ("flux2", "qwenimage", "sd3", "zimage")


# -- the parts of a checkpoint


def tiny_transformer(name: str, *, seed: int = 1, **changes: Any) -> Any:
    """Return the real class with large random weights, so that nothing in it is dead."""
    diffusers = third_party.library("diffusers")
    kind = getattr(diffusers, FAMILIES[name].transformer)
    net = kind(**{**case_of(name).transformer, **changes})
    randomise(net, seed)
    return net.eval()


def tiny_vae(name: str, *, seed: int = 2) -> Any:
    """Return the family's VAE, with latent statistics that matter."""
    return seeded(case_of(name).vae, seed)


def tiny_text(name: str, batch: int, *, seed: int = 3, dtype: torch.dtype = torch.float32) -> Text:
    """Return what `collate` makes of random embeddings, ragged where the family allows it."""
    g = torch.Generator().manual_seed(seed)

    def noise(*shape: int) -> Tensor:
        return torch.randn(shape, generator=g, dtype=torch.float64).to(dtype)

    sample = case_of(name).sample
    return FAMILIES[name].collate([sample(noise, i) for i in range(batch)])


def randomise(net: nn.Module, seed: int) -> None:
    """Fill every weight with noise; norms stay around one."""
    g = torch.Generator().manual_seed(seed)
    for path, weight in net.named_parameters():
        scale = 0.2 if weight.ndim > 1 else 0.1
        centre = 1.0 if "norm" in path and weight.ndim == 1 and path.endswith("weight") else 0.0
        weight.data.copy_(centre + scale * torch.randn(weight.shape, generator=g))


# -- the latent model and its lifted twin


@dataclass(frozen=True)
class Pair:
    """A latent model, the same model in pixels, and what relates them."""

    latent: LatentFlow
    pixel: PixelFlow
    A: Tensor  # (D, d)
    s: float
    geometry: Geometry
    text: Text  # for two samples
    grid: tuple[int, int]


def tiny_geometry(name: str) -> Geometry:
    return FAMILIES[name].geometry(dict(tiny_transformer(name).config), dict(tiny_vae(name).config))


def random_basis(geometry: Geometry, *, seed: int = 4) -> Tensor:
    g = torch.Generator().manual_seed(seed)
    noise = torch.randn(geometry.D, geometry.d, generator=g, dtype=torch.float64)
    return torch.linalg.qr(noise)[0]


def lift(net: Any, family: Family, geometry: Geometry, A: Tensor) -> Any:
    """Return the same class with both maps widened: conversion, in memory."""
    config = {k: v for k, v in net.config.items() if not k.startswith("_")}
    pixel = type(net).from_config(config | family.channels(geometry.pixel_channels))
    weights, patch = net.state_dict(), geometry.patch
    A = A.to(weights[f"{family.first}.weight"].dtype)
    for path in family.first_maps:
        first = f"{path}.weight"
        weights[first] = lift_first(weights[first], A, patch=patch, order=family.order_in)
    for last in (f"{family.last}.weight", f"{family.last}.bias"):
        if last in weights:
            weights[last] = lift_last(weights[last], A, patch=patch, order=family.order_out)
    pixel.to(A.dtype).load_state_dict(weights)
    return pixel.eval()


def lifted_pair(
    name: str,
    *,
    s: float = 0.7,
    dtype: torch.dtype = torch.float64,
    precision: torch.dtype | None = None,
    family: Family | None = None,
    net: Any = None,
) -> Pair:
    """Return two models that must agree; float64 unless asked otherwise."""
    family = family or FAMILIES[name]
    net = (tiny_transformer(name) if net is None else net).double()
    geometry = tiny_geometry(name)
    A = random_basis(geometry)
    pixel = lift(net, family, geometry, A).to(dtype)  # in float64, cast once
    A = A.to(dtype)
    return Pair(
        LatentFlow(net.to(dtype), family, geometry, precision),
        PixelFlow(pixel, family, geometry, A, s, precision),
        A,
        s,
        geometry,
        tiny_text(name, 2, dtype=dtype),
        case_of(name).grid,
    )


# -- whole pipelines, text encoders included


def tiny_pipeline(name: str, *, transformer: Any = None, vae: Any = None) -> Any:
    """Return the real pipeline around tiny parts; it can be called with a prompt."""
    case = case_of(name)
    parts = {
        "transformer": tiny_transformer(name) if transformer is None else transformer,
        "vae": tiny_vae(name) if vae is None else vae,
        "scheduler": case.scheduler(),
        **case.text_parts(),
        **case.pipeline_parts,
    }
    kind = getattr(third_party.library("diffusers"), FAMILIES[name].pipelines[0])
    pipeline = case.assemble(parts) if case.assemble else kind(**parts)
    case.told(pipeline)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def write_pipeline(folder: Path, name: str, **parts: Any) -> Path:
    """Save a whole tiny pipeline as a diffusers folder, as a user would have it."""
    case_of(name).save(tiny_pipeline(name, **parts), folder)
    index = pipeline_index(folder)
    assert index
    index.write_text(json.dumps(dict(case_of(name).pipeline_parts) | json.loads(index.read_text())))
    return folder
