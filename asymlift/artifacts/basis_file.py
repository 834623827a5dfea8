"""basis.safetensors: the subspace A (D, d), the scale s, and where they come from.

The tensors have the names of the published code, `proj_mat_p{p}` and `scale_p{p}`, p the pixel
patch; all else is JSON in the metadata, with a checksum of the whole file. A file of the
published code loads too, but says nothing about its origin and carries no checksum.
"""

import dataclasses
import hashlib
import json
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from asymlift.artifacts.files import write_bytes_atomically
from asymlift.artifacts.parsing import parse_json
from asymlift.artifacts.safetensors_stream import (
    TensorInfo,
    layout,
    read_header,
    read_tensor,
    tensor_bytes,
)
from asymlift.errors import BadData
from asymlift.maths.color import ColorCode

FORMAT = "1"
MAX_ORTHONORMALITY_ERROR = 1e-5  # float32 storage costs 1e-7, bfloat16 1e-3
UNSEALED = "0" * 64


@dataclass(frozen=True)
class Basis:
    """A pixel subspace aligned with a model's latents. None: the file does not say."""

    A: Tensor  # (D, d) float32, canonical token order on both sides
    s: float
    patch: int  # p, in pixels
    method: str | None = None  # procrustes | pca | ...
    family: str | None = None
    order: str = "c p q"
    color: ColorCode | None = None
    num_images: int | None = None
    alignment: dict[str, float] = field(default_factory=dict)  # held-out r2, captured, ...
    spectrum: list[float] = field(default_factory=list)  # singular values or eigenvalues
    vae_fingerprint: str | None = None
    facts: dict[str, Any] = field(default_factory=dict)  # shards, seed, versions: anything JSON

    @property
    def unknown(self) -> list[str]:
        """What a file of the published code leaves open, in words."""
        words = {
            "family": "the model family",
            "color": "the colour space",
            "vae_fingerprint": "the VAE that it was fitted for",
        }
        return [text for name, text in words.items() if getattr(self, name) is None]


# Metadata: each of these as JSON under its own name.
FIELDS = [f.name for f in dataclasses.fields(Basis) if f.name not in ("A", "s")]
KINDS: dict[str, Any] = {
    "patch": int,
    "method": str | None,
    "family": str | None,
    "order": str,
    "color": ColorCode | None,
    "num_images": int | None,
    "alignment": dict,
    "spectrum": list,
    "vae_fingerprint": str | None,
    "facts": dict,
}
OURS = {"asymlift_basis", "checksum", *FIELDS}


def orthonormality_error(A: Tensor) -> float:
    """Largest entry of |A^T A - I|, in float64."""
    A = A.double()
    return float((A.T @ A - torch.eye(A.shape[1], dtype=A.dtype)).abs().max())


def save_basis(path: Path, basis: Basis) -> None:
    """Write a basis; the same basis gives the same bytes."""
    _check(path, basis)
    tensors = {
        f"proj_mat_p{basis.patch}": basis.A.float(),
        f"scale_p{basis.patch}": torch.tensor(basis.s, dtype=torch.float32),
    }
    facts = {name: getattr(basis, name) for name in FIELDS}
    facts["color"] = basis.color and dataclasses.asdict(basis.color)
    metadata = {name: json.dumps(value, sort_keys=True) for name, value in facts.items()}
    metadata |= {"asymlift_basis": FORMAT, "checksum": UNSEALED}
    infos = {name: TensorInfo.of(tensor) for name, tensor in tensors.items()}
    header, placed = layout(infos, metadata)
    data = header + b"".join(tensor_bytes(tensors[name]) for name in placed)
    write_bytes_atomically(path, _with_checksum(data, hashlib.sha256(data).hexdigest()))


def load_basis(path: Path, patch: int | None = None) -> Basis:
    """Read and check a basis; `patch` chooses where a file holds several."""
    header = read_header(path)
    found = (re.fullmatch(r"proj_mat_p(\d{1,6})", name) for name in header.tensors)
    stored = {int(match[1]) for match in found if match}
    if not stored:
        raise BadData(
            f"{path}: not a basis: it has no tensor proj_mat_p16 (or another patch). "
            f"It holds: {', '.join(list(header.tensors)[:5]) or 'nothing'}."
        )
    if patch is None and len(stored) == 1:
        (patch,) = stored
    if patch not in stored:
        held = ", ".join(str(p) for p in sorted(stored))
        wanted = "choose one of them" if patch is None else f"{patch} is asked for"
        raise BadData(f"{path}: holds a basis for patches of {held} pixels; {wanted}.")
    A = read_tensor(path, f"proj_mat_p{patch}", header)
    scale = read_tensor(path, f"scale_p{patch}", header)
    if not A.is_floating_point() or not scale.is_floating_point() or scale.numel() != 1:
        raise BadData(
            f"{path}: proj_mat_p{patch} is {A.dtype} and scale_p{patch} {scale.dtype} of shape "
            f"{tuple(scale.shape)}; a basis is floating point and its scale one number."
        )
    facts = _read_facts(path, header.metadata)
    if facts.setdefault("patch", patch) != patch:
        raise BadData(f"{path}: its metadata says patch {facts['patch']}, its tensors {patch}.")
    basis = Basis(A=A.float(), s=float(scale), **facts)
    _check(path, basis)
    return basis


def _read_facts(path: Path, metadata: dict[str, str]) -> dict[str, Any]:
    if not OURS & set(metadata):
        return {}  # from the published code
    if checksum_of(path) != metadata.get("checksum"):
        raise BadData(f"{path}: damaged (it does not match its checksum). Fit the basis again.")
    if metadata.get("asymlift_basis") != FORMAT:
        found = metadata.get("asymlift_basis")
        raise BadData(f"{path}: a basis of format {found}; this asymlift reads {FORMAT}.")
    try:
        facts = {name: parse_json(metadata[name]) for name in FIELDS}
        if color := facts["color"]:
            mean = tuple(float(value) for value in color["mean"])
            facts["color"] = ColorCode(color["space"], (mean[0], mean[1], mean[2]), color["std"])
        wrong = [name for name, kind in KINDS.items() if not isinstance(facts[name], kind)]
    except (ValueError, KeyError, TypeError, IndexError) as error:
        raise BadData(f"{path}: its metadata cannot be read ({error}). Fit it again.") from None
    if wrong:
        said = f"{type(facts[wrong[0]]).__name__}, which it cannot be"
        raise BadData(f"{path}: its metadata has {wrong[0]} as {said}. Fit the basis again.")
    return facts


def checksum_of(path: Path) -> str:
    """sha256 of the whole file, its checksum field read as zeros. Any changed byte changes it."""
    return hashlib.sha256(_with_checksum(path.read_bytes(), UNSEALED)).hexdigest()


def has_checksum(path: Path) -> bool:
    """False for a file of the published code, whose numbers nothing vouches for."""
    return "checksum" in read_header(path).metadata


def _with_checksum(data: bytes, checksum: str) -> bytes:
    end = 8 + int.from_bytes(data[:8], "little")
    pattern = rb'"checksum":"[0-9a-f]{64}"'
    return re.sub(pattern, b'"checksum":"%s"' % checksum.encode(), data[:end]) + data[end:]


def _check(path: Path, basis: Basis) -> None:
    """Refuse what is no basis for patches of this size."""
    name, width = f"proj_mat_p{basis.patch}", 3 * basis.patch**2
    shape = tuple(basis.A.shape)
    if len(shape) != 2 or shape[0] != width or not 0 < shape[1] <= width:
        raise BadData(
            f"{path}: {name} has shape {shape}; a basis for patches of {basis.patch} pixels "
            f"is ({width}, d) with d <= {width}. Fit it for the right patch."
        )
    if not bool(torch.isfinite(basis.A).all()):
        raise BadData(f"{path}: {name} holds NaN or infinity. Fit the basis again.")
    error = orthonormality_error(basis.A)
    if error > MAX_ORTHONORMALITY_ERROR:
        raise BadData(
            f"{path}: the columns of {name} are not orthonormal: |A^T A - I| reaches "
            f"{error:.1e}, allowed is {MAX_ORTHONORMALITY_ERROR:.0e} (was it cast to bfloat16?)."
        )
    if not 0 < basis.s < float("inf"):
        raise BadData(
            f"{path}: scale_p{basis.patch} is {basis.s:.6g}; it must be a positive number."
        )
