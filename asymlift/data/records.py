"""What a sample is: where its parts lie (a record), and what they hold (a sample in memory).

    KEY.png | .jpg | .jpeg | .webp   the image
    KEY.txt                          its caption, UTF-8
    KEY.json                         facts: width, height, captions (where there are several), label
    KEY.latent.safetensors           "latent" (C, h, w), normalised as the base model expects
    KEY.text.safetensors             what the text encoder made of the caption;
    KEY.text1.safetensors, ...       of the second caption, and so on

The parts may be members of a tar, files of a folder, or lines of a table.

Shapes: image (3, H, W) uint8, latent (C, h, w).
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import Tensor

from asymlift.errors import BadData
from asymlift.redact import redacted

IMAGE_SUFFIXES = (".png", ".jpg", ".jpeg", ".webp")
CAPTION = ".txt"
FACTS = ".json"
LATENT = ".latent.safetensors"
TEXT = ".text.safetensors"
MOST_TEXT = 1 << 22  # bytes of a caption or of facts: as JSON it may take a hundred times as much
MOST_BYTES = 1 << 29  # of one part: it is read at once, and an uncompressed picture has 2^28


class BadSample(BadData):
    """Something that cannot be used: `shard!key`, a reason short enough to count by, details."""

    def __init__(self, where: str, reason: str, detail: str = "", *, count: int = 1) -> None:
        super().__init__(f"{where}: {reason} ({detail})" if detail else f"{where}: {reason}")
        self.where, self.reason, self.detail = redacted(where), reason, redacted(detail)
        self.count = count  # samples that are lost with it; more than one for a whole shard

    @property
    def place(self) -> str:
        """Where and what exactly, for a list of those with one reason."""
        return f"{self.where} ({self.detail})" if self.detail else self.where


OnBad = Callable[[BadSample], None]


@dataclass(frozen=True)
class Part:
    """One part of a sample: a span of a file, or the bytes themselves."""

    path: Path | None
    offset: int
    size: int
    crc: int | None = None  # crc32 of the bytes, where the index knows it
    inline: bytes | None = None


def inline(data: bytes) -> Part:
    return Part(None, 0, len(data), inline=data)


@dataclass(frozen=True)
class Record:
    """Where the parts of a sample lie."""

    key: str
    where: str  # `shard!key` or the image's file: how messages name it
    parts: Mapping[str, Part]  # by suffix
    width: int  # of the image as it is stored, upright; 0 where it is unreadable
    height: int
    target: tuple[int, int] | None = None  # (height, width) that the model sees; None: as stored

    @property
    def image_suffix(self) -> str | None:
        return next((suffix for suffix in IMAGE_SUFFIXES if suffix in self.parts), None)


@dataclass
class Sample:
    """A sample in memory: the image as the model sees it, and one of its captions."""

    key: str
    image: Tensor
    caption: str = ""
    facts: dict[str, Any] = field(default_factory=dict)
    latent: Tensor | None = None
    text: dict[str, Tensor] | None = None


def text_suffix(number: int) -> str:
    """The suffix of the embedding of caption `number`: .text, .text1, .text2, ..."""
    return TEXT if number == 0 else f".text{number}.safetensors"
