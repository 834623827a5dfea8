"""The folder that `sample` draws into: pictures, index.json, grid.png.

The index is written first, as a claim, and again at the end with the sha256 of every picture. A
picture has its name only when it is whole, so a killed run goes on with what is missing.
"""

import re
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import torch

from asymlift.artifacts.files import sha256_file, write_bytes_atomically, writing
from asymlift.artifacts.manifest import canonical_json
from asymlift.artifacts.parsing import parse_json, read_small
from asymlift.data.pictures import decode_image, image_to_float, resize_image
from asymlift.errors import BadData, CannotWrite
from asymlift.report.pictures import grid_png

Weights = Literal["base", "lifted", "ema", "raw"]
INDEX, GRID = "index.json", "grid.png"
PICTURE = re.compile(r"\d{5,}-(base|lifted|ema|raw)\.png")
GRID_COLUMNS, GRID_SIDE = 8, 512  # of grid.png; the single pictures have their full size


@dataclass(frozen=True)
class Picture:
    """One picture of a plan; `number` counts within its prompt."""

    file: str
    weights: Weights
    prompt: str
    number: int
    seed: int


class SampleFolder:
    """`facts` is all that decides what the pictures look like: equal facts, equal pictures."""

    def __init__(self, path: Path, facts: dict[str, Any], pictures: Sequence[Picture]) -> None:
        self.path, self.facts, self.pictures = path, facts, pictures

    @property
    def compares(self) -> bool:
        return len({picture.weights for picture in self.pictures}) > 1

    def missing(self, *, overwrite: bool) -> list[Picture]:
        """The pictures still to draw; a folder that holds others is refused."""
        if overwrite:
            return list(self.pictures)
        if not (self.path / INDEX).exists():
            if self._drawn():
                raise CannotWrite(
                    f"{self.path}: holds pictures and no {INDEX}, so they are not from here.\n"
                    "Choose another folder, or replace them: --overwrite"
                )
            return list(self.pictures)
        index = read_index(self.path)
        if index["facts"] != self.facts:
            keys = self.facts.keys() | index["facts"].keys()
            changed = (k for k in sorted(keys) if self.facts.get(k) != index["facts"].get(k))
            raise CannotWrite(
                f"{self.path}: holds pictures made with other {', '.join(changed)}.\n"
                "Choose another folder, or replace them: --overwrite"
            )
        sha256 = {entry["file"]: entry["sha256"] for entry in index["pictures"]}
        return [
            picture
            for picture in self.pictures
            if not (self.path / picture.file).is_file()
            # A claim knows no digests; a picture that is there is whole all the same.
            or sha256.get(picture.file) not in (None, sha256_file(self.path / picture.file))
        ]

    def is_complete(self) -> bool:
        """Whether there is nothing more to do, once no picture is missing."""
        gridded = not self.compares or (self.path / GRID).is_file()
        return gridded and bool(read_index(self.path)["complete"])

    def claim(self, origin: dict[str, Any], *, overwrite: bool) -> None:
        with writing(self.path):
            self.path.mkdir(parents=True, exist_ok=True)
            if overwrite:
                for old in self._drawn():
                    old.unlink()
        self._write_index(origin, complete=False)

    def finish(self, origin: dict[str, Any], label: Callable[[Weights], str]) -> None:
        """Draw the grid and give every picture its digest."""
        if self.compares:
            write_bytes_atomically(self.path / GRID, self._grid(label))
        self._write_index(origin, complete=True)

    def _drawn(self) -> list[Path]:
        return [path for path in self.path.glob("*.png") if PICTURE.fullmatch(path.name)]

    def _write_index(self, origin: dict[str, Any], *, complete: bool) -> None:
        entries = [
            asdict(picture)
            | {"sha256": sha256_file(self.path / picture.file) if complete else None}
            for picture in self.pictures
        ]
        index = {"kind": "samples", "complete": complete, "facts": self.facts, "pictures": entries}
        write_bytes_atomically(self.path / INDEX, canonical_json(index | origin))

    def _grid(self, label: Callable[[Weights], str]) -> bytes:
        """One row per weights, from the pictures on disk; the first few columns, reduced."""
        rows = []
        for weights in dict.fromkeys(picture.weights for picture in self.pictures):
            row = [picture for picture in self.pictures if picture.weights == weights]
            images = [self._thumbnail(picture.file) for picture in row[:GRID_COLUMNS]]
            rows.append((label(weights), torch.stack(images)))
        return grid_png(rows, max(1, 128 // max(rows[0][1].shape[-2:])))

    def _thumbnail(self, file: str) -> torch.Tensor:
        image = decode_image((self.path / file).read_bytes())
        height, width = image.shape[-2:]
        shrink = min(1.0, GRID_SIDE / max(height, width))
        return image_to_float(resize_image(image, round(height * shrink), round(width * shrink)))


def read_index(folder: Path) -> dict[str, Any]:
    path = folder / INDEX
    try:
        index: dict[str, Any] = parse_json(read_small(path))
        entries = [{"file", "sha256"} <= entry.keys() for entry in index["pictures"]]
        if all(entries) and isinstance(index["facts"], dict) and "complete" in index:
            return index
    except (ValueError, AttributeError, KeyError, TypeError):
        pass
    raise BadData(f"{path}: damaged. Draw the pictures again: --overwrite")
