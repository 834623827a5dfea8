"""Records -> samples: parts read by position in any order, checked, brought to the model's size.

Shapes: image (3, H, W) uint8, latent (C, h, w).
"""

import json
import os
import zlib
from collections.abc import Callable, Collection, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors import SafetensorError
from torch import Tensor

from asymlift.data.buckets import fit_image
from asymlift.data.packing import unpack
from asymlift.data.pictures import BadPicture, decode_image
from asymlift.data.records import (
    CAPTION,
    FACTS,
    LATENT,
    TEXT,
    BadSample,
    Record,
    Sample,
    text_suffix,
)

OPEN_FILES = 64  # handles that a reader keeps
CACHED = (LATENT, TEXT)

Prompt = Literal["caption", "label", "class"]  # a class by number or by name
Choose = Callable[[Sequence[str]], int]  # of several captions, the one to train on


def first_caption(captions: Sequence[str]) -> int:
    return 0


class Reader:
    """Random access to the parts of samples; safe to share between threads."""

    def __init__(self, prompt: Prompt = "caption", *, cached: Collection[str] = CACHED) -> None:
        self.prompt, self.cached = prompt, cached  # of LATENT and TEXT, those that are read
        self._open = lru_cache(OPEN_FILES)(OpenFile)

    def read(self, record: Record, choose: Choose = first_caption) -> Sample:
        """Everything there is to be read; BadSample where a part is broken."""
        facts = self.facts(record)
        captions = self.captions(record, facts)
        chosen = choose(captions) if len(captions) > 1 else 0
        return Sample(
            record.key,
            self.image(record),
            captions[chosen],
            facts,
            self.latent(record) if LATENT in self.cached else None,
            self.text(record, chosen) if TEXT in self.cached else None,
        )

    def bytes_of(self, record: Record, suffix: str) -> bytes:
        part = record.parts[suffix]
        if part.inline is not None:
            return part.inline
        assert part.path is not None, "a part lies somewhere"
        try:
            file = self._open(part.path)  # held until the read is over: see OpenFile
            data = os.pread(file.fd, part.size, part.offset)
        except FileNotFoundError:
            raise BadSample(record.where, "file is missing", str(part.path)) from None
        except OSError as error:
            raise BadSample(record.where, "cannot be read", str(error)) from None
        if len(data) != part.size:
            detail = f"{part.size} bytes of {suffix} expected, {len(data)} there"
            raise BadSample(record.where, "shard is cut off", detail)
        if part.crc is not None and zlib.crc32(data) != part.crc:
            raise BadSample(record.where, "changed since it was indexed", suffix)
        return data

    def image(self, record: Record) -> Tensor:
        """The picture as the model sees it: of the record's target size, if it has one."""
        image = self.stored_image(record)
        return image if record.target is None else fit_image(image, *record.target)

    def stored_image(self, record: Record) -> Tensor:
        suffix = record.image_suffix
        if suffix is None:
            raise BadSample(record.where, "no image")
        try:
            image = decode_image(self.bytes_of(record, suffix))
        except BadPicture as error:
            raise BadSample(record.where, error.reason, error.detail) from None
        height, width = image.shape[-2:]
        if record.width and (record.width, record.height) != (width, height):
            said = f"{record.width} x {record.height}, not {width} x {height}"
            raise BadSample(record.where, "wrong size in the facts", said)
        return image

    def captions(self, record: Record, facts: dict[str, Any]) -> list[str]:
        """What the picture is trained with: at least one; "" where there is no caption."""
        captions = self.stored_captions(record, facts)
        try:
            "".join(captions).encode()
        except UnicodeEncodeError:  # JSON can spell half a character
            raise BadSample(record.where, "caption is not UTF-8") from None
        return captions

    def stored_captions(self, record: Record, facts: dict[str, Any]) -> list[str]:
        if self.prompt != "caption":
            if facts.get(self.prompt) is None:
                raise BadSample(record.where, "no class label", f"no `{self.prompt}` in the facts")
            return [str(facts[self.prompt])]
        if several := facts.get("captions"):
            if not isinstance(several, list) or not all(isinstance(c, str) for c in several):
                raise BadSample(record.where, "captions are not a list of strings")
            return list(several)
        if CAPTION not in record.parts:
            return [""]
        try:
            return [self.bytes_of(record, CAPTION).decode("utf-8-sig").strip()]
        except UnicodeDecodeError:
            raise BadSample(record.where, "caption is not UTF-8") from None

    def facts(self, record: Record) -> dict[str, Any]:
        if FACTS not in record.parts:
            return {}
        try:
            facts = json.loads(self.bytes_of(record, FACTS))
        except (ValueError, RecursionError):
            facts = None
        if not isinstance(facts, dict):
            raise BadSample(record.where, "facts are not a JSON object")
        return facts

    def latent(self, record: Record) -> Tensor | None:
        """The cached latent, finite, or None."""
        tensors = self._tensors(record, LATENT, "latent")
        if tensors is None:
            return None
        latent = tensors.get("latent")
        if latent is None or latent.ndim != 3:
            shapes = ", ".join(f"{name} {tuple(t.shape)}" for name, t in tensors.items())
            need = f"need (C, h, w), has {shapes}"
            raise BadSample(record.where, "latent has the wrong shape", need)
        if not latent.is_floating_point():
            raise BadSample(record.where, "latent has the wrong dtype", str(latent.dtype))
        return latent

    def text(self, record: Record, number: int = 0) -> dict[str, Tensor] | None:
        """The embedding of one of the captions, or None."""
        return self._tensors(record, text_suffix(number), "text")

    def _tensors(self, record: Record, suffix: str, part: str) -> dict[str, Tensor] | None:
        if suffix not in record.parts:
            return None
        data = self.bytes_of(record, suffix)
        try:
            tensors = unpack(data)
            broken = [name for name, tensor in tensors.items() if not is_finite(tensor)]
        except (SafetensorError, ValueError, KeyError, RuntimeError) as error:
            detail = " ".join(str(error).split())
            raise BadSample(record.where, f"{part} is not a safetensors file", detail) from None
        if broken:
            raise BadSample(record.where, f"{part} holds NaN or infinity", broken[0])
        return tensors


def is_finite(tensor: Tensor) -> bool:
    """By the extremes, which are NaN if any number is; torch.isfinite takes 20 times as long."""
    if not tensor.is_floating_point() or not tensor.numel():
        return True
    return all(bool(torch.isfinite(extreme)) for extreme in torch.aminmax(tensor))


class OpenFile:
    """A descriptor that closes once nobody holds it, so a full cache never cuts off a read."""

    def __init__(self, path: Path) -> None:
        self.fd = os.open(path, os.O_RDONLY)

    def __del__(self) -> None:
        if hasattr(self, "fd"):
            os.close(self.fd)
