"""The weights of a transformer, lifted from file to file: two maps change, the rest is copied.

One tensor is in memory at a time; all bytes that are not of the two maps stay as they are.
"""

import json
import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from asymlift.artifacts.diffusers_folder import DiffusersFolder, read_index
from asymlift.artifacts.safetensors_stream import (
    DTYPES,
    Header,
    SafetensorsWriter,
    TensorInfo,
    layout,
    read_tensor,
)
from asymlift.errors import BadData
from asymlift.families.base import TRANSFORMER, Family, Geometry
from asymlift.maths.lift import lift_first, lift_last


@dataclass(frozen=True)
class LiftedWeights:
    """What the files of one lifted network will hold; nothing is written yet."""

    base: DiffusersFolder
    component: str  # of the pipeline
    family: Family
    geometry: Geometry
    A: Tensor  # (D, d)
    headers: dict[Path, Header]  # the base's weight files
    changed: dict[str, TensorInfo]  # the tensors of the two maps, as they will be

    @classmethod
    def of(
        cls,
        base: DiffusersFolder,
        family: Family,
        geometry: Geometry,
        A: Tensor,
        component: str = TRANSFORMER,
    ) -> "LiftedWeights":
        headers = base.headers(component)
        changed = _changed(base.folder(component), family, geometry, headers)
        return cls(base, component, family, geometry, A, headers, changed)

    @property
    def folder(self) -> Path:
        """The base's folder of this network."""
        return self.base.folder(self.component)

    def is_changed(self, path: Path) -> bool:
        """Whether a weight file holds anything of the two maps."""
        return not self.changed.keys().isdisjoint(self.headers[path].tensors)

    def tensors(self, path: Path) -> dict[str, TensorInfo]:
        """What the new version of a weight file holds."""
        tensors = self.headers[path].tensors
        return {name: self.changed.get(name, info) for name, info in tensors.items()}

    def num_bytes(self, path: Path) -> int:
        """The size of the new version of a weight file."""
        head, placed = layout(self.tensors(path), self.headers[path].metadata)
        return len(head) + sum(info.num_bytes for info in placed.values())

    def writer_of(self, path: Path) -> Callable[[Path], str]:
        """Return what writes the new version of a weight file and returns its sha256."""
        header = self.headers[path]

        def write(target: Path) -> str:
            with SafetensorsWriter(target, self.tensors(path), header.metadata) as writer:
                for name in writer.tensors:
                    if name in self.changed:
                        writer.write(name, self._lifted(name, read_tensor(path, name, header)))
                    else:
                        writer.copy(name, path, header.tensors[name])
            return writer.sha256

        return write

    def _lifted(self, name: str, values: Tensor) -> Tensor:
        """One tensor of the two maps: lifted in float64, rounded once to float32."""
        A, q, values = self.A.double(), self.geometry.patch, values.double()
        if name.startswith(f"{self.family.last}."):
            values = lift_last(values, A, patch=q, order=self.family.order_out)
        elif name.endswith(".weight"):
            values = lift_first(values, A, patch=q, order=self.family.order_in)
        # The first bias keeps its values: only its type becomes that of its weight.
        if not bool(torch.isfinite(values).all()):
            raise BadData(f"{self.folder}: {name} holds NaN or infinity. Get the file again.")
        return values.float()

    def config(self) -> bytes:
        """config.json with other channel numbers, in its own order and indentation."""
        original = (self.folder / "config.json").read_text(encoding="utf-8")
        channels = self.family.channels(self.geometry.pixel_channels)
        return _dump_like(original, json.loads(original) | channels)

    def index(self) -> tuple[str, bytes] | None:
        """The index of the shards: the same map, the new size. None without shards."""
        path = self.base.index_path(self.component)
        if path is None:
            return None
        index = read_index(path)
        infos = [info for file in self.headers for info in self.tensors(file).values()]
        index.setdefault("metadata", {})["total_size"] = sum(info.num_bytes for info in infos)
        return path.name, _dump_like(path.read_text(encoding="utf-8"), index)

    def check(self, folder: Path) -> None:
        """What was written has the base's tensors: names, types, and shapes but for the maps."""
        found = _plain(DiffusersFolder(folder).headers(self.component).values())
        expected = _plain(Header(self.tensors(path), {}) for path in self.headers)
        assert found == expected, sorted(found ^ expected)[:3]


def _plain(headers: Iterable[Header]) -> set[tuple[str, str, tuple[int, ...]]]:
    return {(n, i.dtype, i.shape) for header in headers for n, i in header.tensors.items()}


def check_stored_maps(base: DiffusersFolder, family: Family, geometry: Geometry) -> None:
    """Refuse a base whose maps cannot be lifted as they are stored; only headers are read."""
    for component in family.networks:
        if base.has(component):
            _changed(base.folder(component), family, geometry, base.headers(component))


def _changed(
    folder: Path, family: Family, geometry: Geometry, headers: dict[Path, Header]
) -> dict[str, TensorInfo]:
    stored = {name: info for header in headers.values() for name, info in header.tensors.items()}
    for path in (*family.first_maps, family.last):
        if f"{path}.weight" not in stored:
            raise BadData(
                f"{folder}: has no tensor {path}.weight, which family {family.name} names as one "
                "of its two maps."
            )
    changed = {}
    places = [(path, _first_shape) for path in family.first_maps] + [(family.last, _last_shape)]
    for path, lifted_shape in places:
        for name in (f"{path}.weight", f"{path}.bias"):
            info = stored.get(name)
            if info is None:
                continue  # a map without bias
            size, dtype = DTYPES[info.dtype]
            if not dtype.is_floating_point or size == 1:
                raise BadData(
                    f"{folder}: {name} is stored as {info.dtype}. A quantised map cannot be "
                    "lifted; use the checkpoint in bfloat16 or float32 (load it with diffusers, "
                    "dequantized, and save_pretrained it)."
                )
            shape = lifted_shape(info.shape, geometry)
            if shape is None:
                raise BadData(
                    f"{folder}: {name} has shape {info.shape}, which does not go with latent "
                    f"tokens of {geometry.d} numbers."
                )
            changed[name] = TensorInfo("F32", shape)
    return changed


def _first_shape(shape: tuple[int, ...], geometry: Geometry) -> tuple[int, ...] | None:
    """Extra input channels after the latent stay."""
    if len(shape) == 1:
        return shape
    q = geometry.patch
    extra = shape[1] - (geometry.channels if len(shape) == 4 else geometry.d)
    if len(shape) == 4 and shape[2:] == (q, q) and extra >= 0:
        return (shape[0], geometry.pixel_channels + extra, q, q)
    if len(shape) == 4 and shape[1:] == (geometry.d, 1, 1):  # of patches that are packed
        return (shape[0], geometry.D, 1, 1)
    if len(shape) == 2 and extra >= 0 and extra % q**2 == 0:
        return (shape[0], geometry.D + extra)
    return None


def _last_shape(shape: tuple[int, ...], geometry: Geometry) -> tuple[int, ...] | None:
    """Extra output channels after the latent go."""
    extra = shape[0] - geometry.d
    fits = len(shape) <= 2 and extra >= 0 and extra % geometry.patch**2 == 0
    return (geometry.D, *shape[1:]) if fits else None


def _dump_like(original: str, value: object) -> bytes:
    """JSON indented like the file that it replaces."""
    indent = re.match(r"\{\n( +|\t+)", original)
    text = json.dumps(value, indent=indent[1] if indent else None, ensure_ascii=original.isascii())
    return (text + "\n" * original.endswith("\n")).encode()
