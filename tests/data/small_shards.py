"""Small shards for the tests of the data layer: written by us, and packed by others."""

import io
import tarfile
from pathlib import Path

import torch

from asymlift.data.pictures import encode_png
from asymlift.data.records import Sample

PNG = encode_png(torch.zeros(3, 8, 8, dtype=torch.uint8))


def make_sample(index: int, size: int = 16, key: str | None = None) -> Sample:
    """Everything that a sample can have; `size` x (`size` + 8) pixels."""
    draw = torch.Generator().manual_seed(index)
    return Sample(
        key or f"{index:06d}",
        torch.randint(0, 256, (3, size, size + 8), dtype=torch.uint8, generator=draw),
        f"caption {index}",
        {"source": "test"},
        torch.randn(4, 4, 6, generator=draw),
        {"hidden": torch.randn(3, 5, generator=draw).bfloat16()},
    )


def raw_tar(path: Path, members: list[tuple[str, bytes]], kind: int = tarfile.USTAR_FORMAT) -> Path:
    """A tar as anyone may pack it, without an index."""
    with tarfile.open(path, "w", format=kind) as tar:
        for name, data in members:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return path


def overwrite(path: Path, place: int, data: bytes) -> None:
    whole = bytearray(path.read_bytes())
    whole[place : place + len(data)] = data
    path.write_bytes(whole)


def flip(path: Path, place: int) -> None:
    overwrite(path, place, bytes([path.read_bytes()[place] ^ 1]))
