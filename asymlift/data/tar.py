"""Tar headers, every one checked, from a file or from a stream; damage is said and passed over.

`tarfile` takes a damaged header for the end of the archive and says nothing. Here the end must be
marked and only zeros may follow it; after damage the next sound header is looked for.
"""

import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import BinaryIO, Protocol

BLOCK = 512
ZEROS = bytes(BLOCK)
LONGEST_NAME = 1 << 16  # of a GNU long name or a pax header, in bytes
CHECKSUM = slice(148, 156)
PLAIN, DIRECTORY = b"0\0", b"5"
CUT_OFF, DAMAGED, NO_TAR = "shard is cut off", "shard is damaged", "not a tar"


@dataclass(frozen=True)
class Member:
    """A header that was sound: what follows it, and whether that is a file's content."""

    name: str
    offset: int  # of its data
    size: int
    plain: bool
    after_damage: bool = False  # something before it could not be read


@dataclass(frozen=True)
class Damage:
    """What is wrong with an archive at some place; `name` is the member that is cut off."""

    reason: str
    detail: str
    name: str = ""


class Blocks(Protocol):
    """Bytes by position; a stream can only be asked for later and later positions."""

    def read(self, offset: int, count: int) -> bytes: ...


class FileBlocks:
    """A file on disk, read in pieces of a block: headers lie far apart."""

    def __init__(self, fd: int) -> None:
        self.fd = fd

    def read(self, offset: int, count: int) -> bytes:
        return os.pread(self.fd, count, offset)


class StreamBlocks:
    """A pipe or an object store; what is skipped is read and dropped."""

    def __init__(self, stream: BinaryIO) -> None:
        self.stream, self.position = stream, 0

    def read(self, offset: int, count: int) -> bytes:
        assert offset >= self.position, "a stream does not go back"
        while self.position < offset:
            dropped = len(self.stream.read(min(offset - self.position, 1 << 20)))
            if not dropped:
                return b""
            self.position += dropped
        pieces, wanted = list[bytes](), count
        while wanted:
            piece = self.stream.read(wanted)
            if not piece:
                break
            pieces.append(piece)
            wanted -= len(piece)
        data = b"".join(pieces)
        self.position += len(data)
        return data


def scan(
    blocks: Blocks, on_damage: Callable[[Damage], None], *, length: int | None = None
) -> Iterator[Member]:
    """Every member with a sound header, in order; `length` of the archive where it is known."""
    offset, last, long_name, lost = 0, "", "", False
    while True:
        header = blocks.read(offset, BLOCK)
        if len(header) < BLOCK:
            if not last:
                on_damage(Damage(NO_TAR, f"{len(header)} bytes" if header else "an empty file"))
            else:
                on_damage(Damage(CUT_OFF, f"no end of archive at byte {offset}, after {last}"))
            return
        if header == ZEROS or not is_header(header):
            found = next_header(blocks, offset + BLOCK)
            if header == ZEROS and found is None:
                return  # the end, properly marked
            if found is None:
                where = f"no header at byte {offset}" + (last and f", after {last}")
                on_damage(Damage(DAMAGED if last else NO_TAR, where))
                return
            on_damage(
                Damage(DAMAGED, f"bytes {offset} to {found[0]}" + (last and f", after {last}"))
            )
            offset, header = found
            long_name, lost = "", True
        name, size, kind = parse(header)
        start, following = offset + BLOCK, offset + BLOCK + -(-size // BLOCK) * BLOCK
        if kind in b"Lxg":
            if size > LONGEST_NAME:
                on_damage(Damage(DAMAGED, f"a name of {size} bytes at byte {offset}"))
                lost = True
            elif kind != b"g":
                extra = blocks.read(start, size)
                long_name = gnu_name(extra) if kind == b"L" else pax_path(extra) or long_name
            offset = following
            continue
        name, long_name = long_name or name, ""
        plain = kind in PLAIN
        if plain and length is not None and start + size > length:
            detail = f"{size} bytes announced, {max(length - start, 0)} there"
            on_damage(Damage(CUT_OFF, detail, name))
            return
        if kind != DIRECTORY:
            yield Member(name, start, size, plain, lost)
            last, lost = name, False
        # A link or a device has no data, whatever its header says.
        offset = following if plain else start


def is_header(block: bytes) -> bool:
    """Whether a block's checksum is that of a tar header, and its size a number."""
    if not block[0]:
        return False
    try:
        stated = octal(block[CHECKSUM])
        octal(block[124:136])
    except ValueError:
        return False
    return stated == sum(block) - sum(block[CHECKSUM]) + 8 * ord(" ")


def next_header(blocks: Blocks, offset: int) -> tuple[int, bytes] | None:
    """The next sound header at a block's border, and where it is."""
    while len(block := blocks.read(offset, BLOCK)) == BLOCK:
        if block != ZEROS and is_header(block):
            return offset, block
        offset += BLOCK
    return None


def parse(header: bytes) -> tuple[str, int, bytes]:
    """(name, size, type) of a sound header."""
    name = text(header[:100])
    if header[257:263] == b"ustar\0" and header[345]:
        name = f"{text(header[345:500])}/{name}"
    return name, octal(header[124:136]), header[156:157]


def octal(field: bytes) -> int:
    """A number field: octal digits, or GNU's binary for large ones; ValueError otherwise."""
    if field[0] == 0x80:
        return int.from_bytes(field[1:], "big")
    digits = field.strip(b" \0")
    if not digits.isdigit():
        raise ValueError("no number")
    return int(digits, 8)


def text(field: bytes) -> str:
    return field.split(b"\0", 1)[0].decode("utf-8", "surrogateescape")


def gnu_name(data: bytes) -> str:
    return text(data)


def pax_path(data: bytes) -> str:
    """The path in a pax header, "" where there is none: records `LENGTH key=value\\n`."""
    while data:
        length, _, _ = data.partition(b" ")
        if not length.isdigit() or not 0 < int(length) <= len(data):
            return ""
        key, _, value = data[len(length) + 1 : int(length) - 1].partition(b"=")
        if key == b"path":
            return text(value)
        data = data[int(length) :]
    return ""
