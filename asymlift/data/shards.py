"""Shards: WebDataset tars of images, captions and cached latents, read by position.

A shard is indexed once, every header checked, and its members are then read by `pread` in any
order. Reading a tar as a stream would lose everything behind a damaged header without a word.

    000000017.png | .jpg | .webp     the image
    000000017.txt                    its caption, UTF-8
    000000017.json                   facts, among them width and height
    000000017.latent.safetensors     "latent" (C, h, w), normalised as the base model expects
    000000017.text.safetensors       what the text encoder made of the caption

Shapes: image (3, H, W) uint8, latent (C, h, w).
"""

import json
import os
import tarfile
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from glob import glob
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from safetensors import SafetensorError
from torch import Tensor

from asymlift.data.pictures import BadPicture, decode_image, encode_png, image_size
from asymlift.errors import BadData

IMAGE_SUFFIXES = (".png", ".jpg", ".jpeg", ".webp")
CAPTION = ".txt"
FACTS = ".json"
LATENT = ".latent.safetensors"
TEXT = ".text.safetensors"

BLOCK = tarfile.BLOCKSIZE
ZEROS = bytes(BLOCK)
OPEN_SHARDS = 64  # file handles that a reader keeps


class BadSample(BadData):
    """One sample that cannot be used: `shard!key`, a reason short enough to count by, details."""

    def __init__(self, where: str, reason: str, detail: str = "") -> None:
        super().__init__(f"{where}: {reason} ({detail})" if detail else f"{where}: {reason}")
        self.where, self.reason, self.detail = where, reason, detail


OnBad = Callable[[BadSample], None]


@dataclass(frozen=True)
class SampleIndex:
    """Where the members of a sample lie; width and height are 0 where the image is unreadable."""

    key: str
    members: Mapping[str, tuple[int, int]]  # suffix -> (offset, size)
    width: int
    height: int
    shard: Path

    @property
    def where(self) -> str:
        return f"{self.shard}!{self.key}"

    @property
    def image_suffix(self) -> str | None:
        return next((suffix for suffix in IMAGE_SUFFIXES if suffix in self.members), None)


@dataclass(frozen=True)
class ShardIndex:
    path: Path
    samples: list[SampleIndex]


@dataclass
class Sample:
    """A sample in memory, as it is written to a shard and read back."""

    key: str
    image: Tensor
    caption: str = ""
    facts: dict[str, Any] = field(default_factory=dict)
    latent: Tensor | None = None
    text: dict[str, Tensor] | None = None


Members = Mapping[str, bytes]  # suffix -> file content


# ---- finding and indexing ------------------------------------------------------------------


def expand(patterns: str | Path | Sequence[str | Path]) -> list[Path]:
    """Shard paths of `train/{000000..000119}.tar`, `train/*.tar`, a path, or a list of these."""
    from braceexpand import braceexpand

    paths: list[Path] = []
    for pattern in [patterns] if isinstance(patterns, str | Path) else patterns:
        if "://" in str(pattern) or str(pattern).startswith("pipe:"):
            raise BadData(f"{pattern}: shards are read from local files; copy them here first")
        for name in braceexpand(str(pattern)):
            found = sorted(glob(name)) if any(mark in name for mark in "*?[") else [name]  # noqa: PTH207
            if not found:
                raise BadData(f"{name}: no shard matches this pattern")
            for path in map(Path, found):
                if not path.is_file():
                    raise BadData(f"{path}: there is no such shard; is the path or range right?")
                paths.append(path)
    if len(set(paths)) != len(paths):
        twice = next(path for path in paths if paths.count(path) > 1)
        raise BadData(f"{twice}: this shard is listed twice")
    return paths


def index_shards(paths: Iterable[Path], *, on_bad: OnBad | None = None) -> list[ShardIndex]:
    """Index every shard; a key may occur only once in all of them."""
    indexes, seen = [], dict[str, Path]()
    for path in paths:
        samples = []
        for sample in index_shard(path, on_bad=on_bad).samples:
            first = seen.setdefault(sample.key, path)
            if first is path:
                samples.append(sample)
            else:
                report(on_bad, BadSample(sample.where, "duplicate key", f"also in {first}"))
        indexes.append(ShardIndex(path, samples))
    return indexes


def index_shard(path: Path, *, on_bad: OnBad | None = None) -> ShardIndex:
    """Check every header of a tar and note where its members lie.

    A damaged archive always raises. A sample that is wrong in itself raises too, or goes to
    `on_bad` and is left out.
    """
    found: dict[str, dict[str, tuple[int, int]]] = {}
    faults: dict[str, tuple[str, str]] = {}  # key -> the first thing wrong with it
    last = None
    with path.open("rb") as file:
        for name, offset, size, is_file in scan_tar(file, path):
            stem, _, rest = name.partition(".")
            key, suffix = stem, f".{rest.lower()}"
            members = found.setdefault(key, {})
            fault = fault_in_name(name) or (None if is_file else ("not a plain file", name))
            if fault is None and suffix in members:
                fault = ("duplicate suffix", suffix)
            if fault is None and members and key != last:
                fault = ("duplicate key", "the members of a sample must follow each other")
            if fault is None and size == 0:
                fault = ("empty member", suffix)
            if fault is not None:
                faults.setdefault(key or name, fault)
            members[suffix] = (offset, size)
            last = key
        for key, members in found.items():
            images = [suffix for suffix in IMAGE_SUFFIXES if suffix in members]
            if len(images) > 1:
                faults.setdefault(key, ("two images", ", ".join(images)))
        for key, fault in faults.items():
            report(on_bad, BadSample(f"{path}!{key}", *fault))
        samples = [
            SampleIndex(key, members, *size_in(file.fileno(), members), path)
            for key, members in found.items()
            if key and key not in faults
        ]
    return ShardIndex(path, samples)


def report(on_bad: OnBad | None, fault: BadSample) -> None:
    if on_bad is None:
        raise fault
    on_bad(fault)


def fault_in_name(name: str) -> tuple[str, str] | None:
    """Keys become parts of messages and file names, so nothing but a plain name is one."""
    stem, _, suffix = name.partition(".")
    if "/" in name or "\\" in name:
        return "key with a path in it", "pack the files without folders"
    if not name.isprintable():
        return "key with unprintable characters", ascii(name)
    if not stem or not suffix:
        return "member without key or suffix", name
    return None


def scan_tar(file: Any, path: Path) -> Iterator[tuple[str, int, int, bool]]:
    """(name, offset, size, whether it is a plain file) of each member, to the very last block.

    `tarfile` itself takes a damaged header for the end; here the end must be marked, and only
    zeros may follow it.
    """
    total, offset, last = os.fstat(file.fileno()).st_size, 0, "the start"

    def damaged(what: str) -> BadData:
        return BadData(
            f"{path}: {what} at byte {offset} of {total}, after {last}; "
            "the shard is damaged or not a tar: copy or make it again"
        )

    try:
        tar = tarfile.TarFile(fileobj=file)
    except tarfile.TarError as error:
        raise damaged(f"no tar header ({error})") from None
    while True:
        file.seek(offset)
        header = file.read(BLOCK)
        if header == ZEROS:
            break
        if len(header) < BLOCK:
            raise damaged("cut off inside a header" if header else "cut off, no end of archive")
        file.seek(offset)
        try:
            member = tarfile.TarInfo.fromtarfile(tar)  # also reads long names and pax headers
        except (tarfile.TarError, ValueError) as error:
            raise damaged(f"damaged header ({error})") from None
        start, size = member.offset_data, member.size
        if size < 0 or start <= offset:
            raise damaged("damaged header (impossible size)")
        if start + size > total:
            raise BadData(
                f"{path}!{member.name.partition('.')[0]}: cut off inside {member.name}: "
                f"{size} bytes announced, {max(total - start, 0)} there; copy or make it again"
            )
        plain = member.isreg() and not member.issparse()
        yield member.name, start, size, plain
        offset = start + (-(-size // BLOCK) * BLOCK if member.isreg() else 0)
        last = member.name
    file.seek(offset)
    tail = file.read()
    if len(tail) < 2 * BLOCK:
        raise damaged("cut off, half of the end of archive is missing")
    if tail.strip(b"\0"):
        raise damaged("zeros in the middle of the archive")


def size_in(fd: int, members: Mapping[str, tuple[int, int]]) -> tuple[int, int]:
    """(width, height) from the facts, else from the image's header, else zeros."""
    if FACTS in members:
        try:
            facts = json.loads(os.pread(fd, members[FACTS][1], members[FACTS][0]))
            width, height = facts["width"], facts["height"]
            if isinstance(width, int) and isinstance(height, int) and min(width, height) > 0:
                return width, height
        except (ValueError, KeyError, TypeError):
            pass  # facts that are no JSON are named when the sample is read
    for suffix in IMAGE_SUFFIXES:
        if suffix in members:
            try:
                return image_size(os.pread(fd, members[suffix][1], members[suffix][0]))
            except BadPicture:
                break  # likewise
    return 0, 0


# ---- reading ---------------------------------------------------------------------------------


class ShardReader:
    """Random access to indexed samples; safe to share between threads."""

    def __init__(self) -> None:
        self._open = lru_cache(OPEN_SHARDS)(OpenFile)

    def read(self, sample: SampleIndex) -> Sample:
        """Everything there is; BadSample where a part is broken."""
        return Sample(
            sample.key,
            self.image(sample),
            self.caption(sample),
            self.facts(sample),
            self.latent(sample),
            self.text(sample),
        )

    def bytes_of(self, sample: SampleIndex, suffix: str) -> bytes:
        offset, size = sample.members[suffix]
        file = self._open(sample.shard)  # held until the read is over: see OpenFile
        data = os.pread(file.fd, size, offset)
        if len(data) != size:
            raise BadSample(sample.where, "shard changed since it was indexed")
        return data

    def image(self, sample: SampleIndex) -> Tensor:
        suffix = sample.image_suffix
        if suffix is None:
            raise BadSample(sample.where, "no image")
        try:
            image = decode_image(self.bytes_of(sample, suffix))
        except BadPicture as error:
            raise BadSample(sample.where, error.reason, error.detail) from None
        height, width = image.shape[-2:]
        if (sample.width, sample.height) != (width, height):
            said = f"{sample.width} x {sample.height}"
            raise BadSample(
                sample.where, "wrong size in the facts", f"{said}, not {width} x {height}"
            )
        return image

    def caption(self, sample: SampleIndex) -> str:
        """The caption, "" where there is none."""
        if CAPTION not in sample.members:
            return ""
        try:
            return self.bytes_of(sample, CAPTION).decode("utf-8").strip()
        except UnicodeDecodeError:
            raise BadSample(sample.where, "caption is not UTF-8") from None

    def facts(self, sample: SampleIndex) -> dict[str, Any]:
        if FACTS not in sample.members:
            return {}
        try:
            facts = json.loads(self.bytes_of(sample, FACTS))
        except ValueError:
            facts = None
        if not isinstance(facts, dict):
            raise BadSample(sample.where, "facts are not a JSON object")
        return facts

    def latent(self, sample: SampleIndex) -> Tensor | None:
        """The cached latent, finite and floating point, or None."""
        tensors = self._tensors(sample, LATENT)
        if tensors is None:
            return None
        latent = tensors.get("latent")
        if latent is None or latent.ndim != 3:
            shapes = ", ".join(f"{name} {tuple(t.shape)}" for name, t in tensors.items())
            raise BadSample(
                sample.where, "latent has the wrong shape", f"need (C, h, w), has {shapes}"
            )
        return latent

    def text(self, sample: SampleIndex) -> dict[str, Tensor] | None:
        return self._tensors(sample, TEXT)

    def _tensors(self, sample: SampleIndex, suffix: str) -> dict[str, Tensor] | None:
        if suffix not in sample.members:
            return None
        part = suffix.split(".")[1]
        try:
            tensors: dict[str, Tensor] = safetensors.torch.load(self.bytes_of(sample, suffix))
        except (SafetensorError, ValueError, KeyError) as error:
            raise BadSample(sample.where, f"{part} is not a safetensors file", str(error)) from None
        for name, tensor in tensors.items():
            if tensor.is_floating_point() and not torch.isfinite(tensor).all():
                raise BadSample(sample.where, f"{part} holds NaN or infinity", name)
        return tensors


class OpenFile:
    """A descriptor that closes once nobody holds it, so a full cache never cuts off a read."""

    def __init__(self, path: Path) -> None:
        self.fd = os.open(path, os.O_RDONLY)

    def __del__(self) -> None:
        if hasattr(self, "fd"):
            os.close(self.fd)


# ---- writing ---------------------------------------------------------------------------------


def write_shard(path: Path, samples: Iterable[Sample | tuple[str, Members]]) -> int:
    """Write samples, or members already packed, and return how many.

    The shard appears under its name only when it is whole; equal samples give equal bytes.
    """
    os.environ["WDS_SECURE"] = "1"  # read when webdataset is imported: no pickles, no pipes
    import webdataset

    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
    keys: set[str] = set()
    try:
        with partial.open("wb") as file:
            with webdataset.TarWriter(file, encoder=False, user="", group="", mtime=0) as tar:
                for sample in samples:
                    key, members = pack(sample) if isinstance(sample, Sample) else sample
                    fault = fault_in_name(f"{key}.x") or ("." in key and ("key with a dot", ""))
                    if fault or key in keys:
                        raise BadSample(f"{path}!{key}", *(fault or ("duplicate key",)))
                    keys.add(key)
                    tar.write({"__key__": key} | {s[1:]: data for s, data in members.items()})
            file.flush()
            os.fsync(file.fileno())
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)
    return len(keys)


def pack(sample: Sample) -> tuple[str, Members]:
    """The members of a sample as file contents; the image as PNG, so that nothing is lost."""
    height, width = sample.image.shape[-2:]
    facts = {**sample.facts, "width": width, "height": height}
    members = {
        ".png": encode_png(sample.image),
        FACTS: json.dumps(facts, sort_keys=True).encode(),
    }
    if sample.caption:
        members[CAPTION] = sample.caption.encode()
    if sample.latent is not None:
        members[LATENT] = safetensors.torch.save({"latent": sample.latent.cpu().contiguous()})
    if sample.text is not None:
        text = {name: tensor.cpu().contiguous() for name, tensor in sample.text.items()}
        members[TEXT] = safetensors.torch.save(text)
    return sample.key, members
