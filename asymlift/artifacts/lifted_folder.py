"""lifted/: a diffusers pipeline folder whose transformer reads pixel tokens.

A second network of the same class is lifted with it, by the same A and s, where the family has one.
Beside the transformer's own files lie asymlift.safetensors (A, s; named as in a basis) and
asymlift.json (family, networks, geometry, colour, fingerprints, how well the conversion was
verified).
"""

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from asymlift.artifacts.basis_file import MAX_ORTHONORMALITY_ERROR, orthonormality_error
from asymlift.artifacts.diffusers_folder import is_plain_name, read_json
from asymlift.artifacts.files import sha256_file, write_bytes_atomically
from asymlift.artifacts.manifest import Manifest, canonical_json, read_manifest
from asymlift.artifacts.safetensors_stream import load_tensors, save_tensors
from asymlift.errors import BadData
from asymlift.families.base import TRANSFORMER, Geometry
from asymlift.maths.color import ColorCode

KIND = "lifted"
FORMAT = 1
FACTS = "transformer/asymlift.json"
TENSORS = "transformer/asymlift.safetensors"
OF_BASE = "base_"  # with a component's name: the fingerprint of what a network was lifted from


@dataclass(frozen=True)
class Lifted:
    """What turns the stock transformer in this folder into a pixel model."""

    folder: Path
    family: str
    geometry: Geometry
    A: Tensor  # (D, d) float32
    s: float
    color: ColorCode
    fingerprints: dict[str, str]  # base transformer, vae, basis: what it was made from
    facts: dict[str, Any]  # all of asymlift.json
    networks: tuple[str, ...] = (TRANSFORMER,)  # the components that read pixel tokens


def write_lifted_facts(
    folder: Path,
    *,
    family: str,
    networks: Sequence[str],
    geometry: Geometry,
    A: Tensor,
    s: float,
    color: ColorCode,
    fingerprints: dict[str, str],
    more: dict[str, Any],
) -> None:
    """Write the two files that are ours into a lifted folder."""
    p = geometry.pixel_patch
    save_tensors(folder / TENSORS, {f"proj_mat_p{p}": A, f"scale_p{p}": torch.tensor(s)})
    facts = {
        "format": FORMAT,
        "family": family,
        "networks": list(networks),
        "geometry": dataclasses.asdict(geometry),
        "color": dataclasses.asdict(color),
        "fingerprints": fingerprints,
        **more,
    }
    write_bytes_atomically(folder / FACTS, canonical_json(facts))


def read_lifted(folder: Path) -> Lifted:
    """Read what convert wrote beside the transformer. Big files are left to `asymlift verify`."""
    manifest = read_manifest(folder)
    if manifest.kind != KIND:
        raise BadData(f"{folder}: holds a {manifest.kind}, not a lifted model.")
    _check_bytes(folder, manifest, FACTS, TENSORS, "transformer/config.json")
    facts = read_json(folder / FACTS)
    if facts.get("format") != FORMAT:
        raise BadData(f"{folder / FACTS}: format {facts.get('format')}; this one reads {FORMAT}.")
    tensors = load_tensors(folder / TENSORS)
    try:
        geometry, color = Geometry(**facts["geometry"]), facts["color"]
        p, mean = geometry.pixel_patch, tuple(float(value) for value in color["mean"])
        A, s = tensors[f"proj_mat_p{p}"], tensors[f"scale_p{p}"]
        code = ColorCode(color["space"], (mean[0], mean[1], mean[2]), float(color["std"]))
        family, networks = str(facts["family"]), _networks(facts["networks"])
        fingerprints = _texts(facts["fingerprints"])
        if not isinstance(facts.get("verification", {}), dict):
            raise TypeError("verification is no object")
    except (KeyError, TypeError, ValueError, IndexError, AttributeError) as error:
        said = f"{type(error).__name__}: {error}"
        raise BadData(f"{folder / FACTS}: not as convert writes it ({said}).") from None
    if s.numel() != 1:
        raise BadData(f"{folder / TENSORS}: a scale is one number, not {tuple(s.shape)}.")
    if tuple(A.shape) != (geometry.D, geometry.d) or A.dtype != torch.float32:
        raise BadData(
            f"{folder / TENSORS}: A is {tuple(A.shape)} of {A.dtype}, not "
            f"{(geometry.D, geometry.d)} of float32."
        )
    if not orthonormality_error(A) <= MAX_ORTHONORMALITY_ERROR or not 0 < float(s) < float("inf"):
        raise BadData(f"{folder / TENSORS}: A is not orthonormal, or s = {float(s)} not positive.")
    lifted = Lifted(
        folder=folder,
        family=family,
        geometry=geometry,
        A=A,
        s=float(s),
        color=code,
        fingerprints=fingerprints,
        facts=facts,
        networks=networks,
    )
    for component in networks:
        _check_bytes(folder, manifest, f"{component}/config.json")
    return lifted


def _networks(names: Any) -> tuple[str, ...]:
    if not isinstance(names, list) or TRANSFORMER not in names:
        raise TypeError(f"networks are {names!r}, no list with {TRANSFORMER!r}")
    for name in names:
        if not isinstance(name, str) or not is_plain_name(name):
            raise ValueError(f"{name!r} is no plain folder name")
    return tuple(names)


def _texts(values: Any) -> dict[str, str]:
    if not isinstance(values, dict) or not all(isinstance(v, str) for v in values.values()):
        raise TypeError("fingerprints are no texts by name")
    return values


def _check_bytes(folder: Path, manifest: Manifest, *names: str) -> None:
    for name in names:
        path = folder / name
        if name not in manifest.files or not path.is_file():
            raise BadData(f"{path}: missing. Run `asymlift convert` again.")
        if sha256_file(path) != manifest.files[name][1]:
            raise BadData(f"{path}: its bytes have changed. Run `asymlift convert` again.")
