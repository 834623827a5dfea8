"""safetensors files read and written one tensor at a time.

The bytes are those of the safetensors package: its order of tensors, its header, its padding.
"""

import errno
import json
import math
import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import torch
from torch import Tensor

from asymlift.artifacts.files import CHUNK, fsync_folder, sha256_file, writing
from asymlift.artifacts.parsing import MOST_JSON, parse_json
from asymlift.errors import BadData

# In the package's order: tensors with the widest numbers first, so that all are aligned.
DTYPES: dict[str, tuple[int, torch.dtype]] = {
    "U64": (8, torch.uint64),
    "I64": (8, torch.int64),
    "F64": (8, torch.float64),
    "C64": (8, torch.complex64),
    "F32": (4, torch.float32),
    "U32": (4, torch.uint32),
    "I32": (4, torch.int32),
    "BF16": (2, torch.bfloat16),
    "F16": (2, torch.float16),
    "U16": (2, torch.uint16),
    "I16": (2, torch.int16),
    "F8_E8M0": (1, torch.float8_e8m0fnu),
    "F8_E4M3": (1, torch.float8_e4m3fn),
    "F8_E5M2": (1, torch.float8_e5m2),
    "I8": (1, torch.int8),
    "U8": (1, torch.uint8),
    "BOOL": (1, torch.bool),
}
RANK = {name: position for position, name in enumerate(DTYPES)}
NAME_OF = {dtype: name for name, (_, dtype) in DTYPES.items()}


@dataclass(frozen=True)
class TensorInfo:
    """One tensor in a file; `start` counts from the beginning of the file."""

    dtype: str
    shape: tuple[int, ...]
    start: int = 0

    @property
    def num_bytes(self) -> int:
        return math.prod(self.shape) * DTYPES[self.dtype][0]

    @classmethod
    def of(cls, tensor: Tensor) -> Self:
        return cls(NAME_OF[tensor.dtype], tuple(tensor.shape))


@dataclass(frozen=True)
class Header:
    """What a file says about itself: tensors in the order of their bytes, and its metadata."""

    tensors: dict[str, TensorInfo]
    metadata: dict[str, str]


def read_header(path: Path) -> Header:
    """Read and check a header: known types, no holes, no overlaps, nothing missing at the end."""
    try:
        size = path.stat().st_size
        with path.open("rb") as file:
            length = int.from_bytes(file.read(8), "little")
            text = file.read(length) if 8 + length <= size and length <= MOST_JSON else b""
    except FileNotFoundError:
        raise BadData(f"{path}: there is no such file.") from None
    except OSError as error:
        raise BadData(f"{path}: cannot be read ({error.strerror}).") from error
    if MOST_JSON < length <= size:
        raise BadData(f"{path}: its header is longer than {MOST_JSON} bytes, which no model needs.")
    if not text:
        raise BadData(f"{path}: not a safetensors file, or cut short in its header.")
    try:
        entries = parse_json(text, _no_duplicates)
        metadata = entries.pop("__metadata__", {})
        if not all(isinstance(text, str) for text in metadata.values()):
            raise ValueError("its metadata holds something else than text")
        tensors = {name: _tensor_info(name, entry, 8 + length) for name, entry in entries.items()}
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise BadData(f"{path}: its safetensors header is damaged ({error}).") from error
    tensors = dict(sorted(tensors.items(), key=lambda item: (item[1].start, item[1].num_bytes)))
    end = 8 + length
    for name, info in tensors.items():
        if info.start != end:
            raise BadData(f"{path}: {name} begins at byte {info.start}, not at {end}: damaged.")
        end += info.num_bytes
    if end != size:
        raise BadData(f"{path}: {size} bytes long, its header says {end}: cut short or damaged.")
    return Header(tensors, metadata)


def _no_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    table = dict(pairs)
    if len(table) != len(pairs):
        raise ValueError("a name occurs twice")
    return table


def _tensor_info(name: str, entry: Mapping[str, Any], data_start: int) -> TensorInfo:
    dtype, shape, (start, stop) = entry["dtype"], entry["shape"], entry["data_offsets"]
    if dtype not in DTYPES:
        raise ValueError(f"{name} has the unknown type {dtype!r}")
    if not all(type(number) is int and number >= 0 for number in (*shape, start, stop)):
        raise ValueError(f"{name} has a negative or broken size")
    info = TensorInfo(dtype, tuple(shape), data_start + start)
    if info.num_bytes != stop - start:
        raise ValueError(f"{name} has {stop - start} bytes for shape {shape} of {dtype}")
    return info


def read_bytes(path: Path, info: TensorInfo) -> Iterator[memoryview]:
    """The bytes of one tensor, in pieces of at most CHUNK that are valid until the next one."""
    buffer = memoryview(bytearray(min(CHUNK, info.num_bytes)))
    left = info.num_bytes
    with path.open("rb", buffering=0) as file:
        file.seek(info.start)
        while left:
            count = file.readinto(buffer[: min(left, len(buffer))])
            if not count:
                raise BadData(f"{path}: ended while it was being read.")
            left -= count
            yield buffer[:count]


def read_tensor(path: Path, name: str, header: Header | None = None) -> Tensor:
    """One tensor, in the type it is stored in, without reading the rest of the file."""
    return _load(path, _find(path, name, header or read_header(path)))


def read_stretch(path: Path, name: str, stretch: slice, header: Header) -> Tensor:
    """A stretch of a flattened tensor, without reading the rest of it."""
    info = _find(path, name, header)
    count, size = stretch.stop - stretch.start, DTYPES[info.dtype][0]
    if not 0 <= stretch.start <= stretch.stop <= math.prod(info.shape):
        raise BadData(
            f"{path}: {name} has the shape {list(info.shape)}, and numbers {stretch.start} to "
            f"{stretch.stop} of it are needed."
        )
    return _load(path, TensorInfo(info.dtype, (count,), info.start + stretch.start * size))


def stretch_reader(path: Path) -> Callable[[str, slice], Tensor]:
    """Reads stretches of one tensor of a file at a time, by name."""
    header = read_header(path)
    return lambda name, stretch: read_stretch(path, name, stretch, header)


def _find(path: Path, name: str, header: Header) -> TensorInfo:
    info = header.tensors.get(name)
    if info is None:
        raise BadData(f"{path}: there is no tensor called {name}.")
    return info


def _load(path: Path, info: TensorInfo) -> Tensor:
    data, end = bytearray(info.num_bytes), 0
    for piece in read_bytes(path, info):
        data[end : end + len(piece)] = piece
        end += len(piece)
    dtype = DTYPES[info.dtype][1]
    if not data:
        return torch.empty(info.shape, dtype=dtype)
    return torch.frombuffer(data, dtype=dtype).reshape(info.shape)


def tensor_bytes(tensor: Tensor) -> memoryview:
    """A tensor's bytes as they stand in a file (little-endian machines)."""
    flat = tensor.detach().cpu().contiguous().reshape(-1)
    return flat.view(torch.uint8).numpy().data if flat.numel() else memoryview(b"")


def layout(
    infos: Mapping[str, TensorInfo], metadata: Mapping[str, str] | None = None
) -> tuple[bytes, dict[str, TensorInfo]]:
    """The header bytes of a file with these tensors, and where each of them goes."""
    order = sorted(infos, key=lambda name: (RANK[infos[name].dtype], name))
    entries: dict[str, Any] = {}
    if metadata:
        entries["__metadata__"] = dict(sorted(metadata.items()))
    offset = 0
    for name in order:
        stop = offset + infos[name].num_bytes
        entries[name] = {
            "dtype": infos[name].dtype,
            "shape": list(infos[name].shape),
            "data_offsets": [offset, stop],
        }
        offset = stop
    text = json.dumps(entries, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    start = 8 + len(text)
    placed = {
        name: TensorInfo(
            infos[name].dtype, infos[name].shape, start + entries[name]["data_offsets"][0]
        )
        for name in order
    }
    return len(text).to_bytes(8, "little") + text, placed


class SafetensorsWriter:
    """Write one file tensor by tensor, in any order.

    The file gets its name only when all its bytes are on disk; after an exception nothing is
    left. `sha256`, of the bytes as they are read back, is known after the `with` block.
    """

    def __init__(
        self,
        path: Path,
        infos: Mapping[str, TensorInfo],
        metadata: Mapping[str, str] | None = None,
    ) -> None:
        self.path = path
        self.sha256 = ""
        self._header, self.tensors = layout(infos, metadata)
        self._part = path.with_name(path.name + ".part")
        self._waiting = set(self.tensors)

    def __enter__(self) -> Self:
        with writing(self.path):
            self._file = self._part.open("wb", buffering=0)
            self._put(0, self._header)
        return self

    def write(self, name: str, data: Tensor | bytes | Iterable[bytes | memoryview]) -> None:
        """Write one tensor, whole."""
        info = self._begin(name)
        if isinstance(data, Tensor):
            assert TensorInfo.of(data) == TensorInfo(info.dtype, info.shape), name
            data = [tensor_bytes(data)]
        elif isinstance(data, bytes):
            data = [data]
        offset = info.start
        with writing(self.path):
            for piece in data:
                offset += self._put(offset, piece)
        assert offset == info.start + info.num_bytes, f"{name}: {offset - info.start} bytes"

    def copy(self, name: str, path: Path, source: TensorInfo) -> None:
        """Take the bytes of a tensor over from another file, inside the kernel where it can."""
        info = self._begin(name)
        assert (info.dtype, info.shape) == (source.dtype, source.shape), name
        done = 0
        with writing(self.path), path.open("rb", buffering=0) as file:
            while done < info.num_bytes:
                count = _copy_range(
                    file.fileno(),
                    self._file.fileno(),
                    min(CHUNK, info.num_bytes - done),
                    source.start + done,
                    info.start + done,
                )
                if not count:
                    raise BadData(f"{path}: ended while it was being read.")
                done += count

    def _begin(self, name: str) -> TensorInfo:
        self._waiting.remove(name)  # KeyError: written twice
        return self.tensors[name]

    def _put(self, offset: int, data: bytes | memoryview) -> int:
        view = memoryview(data)
        while len(view):
            count = os.pwrite(self._file.fileno(), view, offset)
            offset += count
            view = view[count:]
        return len(data)

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if kind is None:
            try:
                self._finish()
                return
            except BaseException:
                self._discard()
                raise
        self._discard()

    def _finish(self) -> None:
        assert not self._waiting, f"never written: {sorted(self._waiting)}"
        with writing(self.path):
            with ThreadPoolExecutor(1) as pool:  # hashing computes, syncing waits for the disk
                digest = pool.submit(sha256_file, self._part)
                os.fsync(self._file.fileno())
                self._file.close()
                self.sha256 = digest.result()
            self._part.replace(self.path)
            fsync_folder(self.path.parent)

    def _discard(self) -> None:
        self._file.close()
        self._part.unlink(missing_ok=True)


def _copy_range(source: int, target: int, count: int, start: int, to: int) -> int:
    try:
        return os.copy_file_range(source, target, count, start, to)
    except (AttributeError, OSError) as error:  # not Linux; another, or a peculiar, file system
        refusals = (errno.EXDEV, errno.ENOSYS, errno.EOPNOTSUPP, errno.EINVAL, errno.EPERM)
        if isinstance(error, OSError) and error.errno not in refusals:
            raise
        return os.pwrite(target, os.pread(source, count, start), to)


def save_tensors(
    path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str] | None = None
) -> str:
    """Write a small file at once, atomically; returns its sha256."""
    infos = {name: TensorInfo.of(tensor) for name, tensor in tensors.items()}
    with SafetensorsWriter(path, infos, metadata) as writer:
        for name in writer.tensors:
            writer.write(name, tensors[name])
    return writer.sha256


def load_tensors(path: Path) -> dict[str, Tensor]:
    """All tensors of a small file."""
    header = read_header(path)
    return {name: read_tensor(path, name, header) for name in header.tensors}
