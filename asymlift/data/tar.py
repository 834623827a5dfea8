"""Tar headers, every one checked, from a file or from a stream; damage is said and passed over.

`tarfile` takes a damaged header for the end of the archive and says nothing. Here the end must be
marked and only zeros may follow it; after damage the next sound header is looked for.
"""

import os
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import BinaryIO, Protocol

BLOCK = 512
ZEROS = bytes(BLOCK)
LONGEST_NAME = 1 << 20  # of a GNU long name or a pax header, in bytes
LARGEST = 1 << 60  # bytes of a member: more is no size but damage
CHECKSUM = slice(148, 156)
PLAIN, DIRECTORY = b"\x0007", b"5"
WITHOUT_DATA = b"123456"  # links, devices, directories, pipes, whatever size they state
BEFORE_A_MEMBER = b"LKxXg"  # long names and pax headers, about the next member or all of them
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

    at_once: int  # how much to read where a header is looked for

    def read(self, offset: int, count: int) -> bytes: ...


class FileBlocks:
    """A file on disk, read in pieces of a block: headers lie far apart."""

    at_once = 1 << 20

    def __init__(self, fd: int) -> None:
        self.fd = fd

    def read(self, offset: int, count: int) -> bytes:
        return os.pread(self.fd, count, offset)


class StreamBlocks:
    """A pipe or an object store; what is skipped is read and dropped."""

    at_once = BLOCK

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
    offset, last, lost, is_tar = 0, "", False, False
    extra: dict[bytes, bytes] = {}  # what headers before a member say of it
    while True:
        header = blocks.read(offset, BLOCK)
        after = f", after {shown(last)}" if last else ""
        if len(header) < BLOCK:
            if is_tar:
                on_damage(Damage(CUT_OFF, f"no end of archive at byte {offset}{after}"))
            else:
                on_damage(Damage(NO_TAR, f"{len(header)} bytes" if header else "an empty file"))
            return
        if header == ZEROS or not is_header(header):
            found, only_zeros = next_header(blocks, offset + BLOCK)
            if found is None:
                if header == ZEROS and only_zeros:
                    return  # the end, properly marked
                where = f"no header at byte {offset}{after}"
                on_damage(Damage(DAMAGED if is_tar else NO_TAR, where))
                return
            on_damage(Damage(DAMAGED, f"bytes {offset} to {found[0]}{after}"))
            offset, header = found
            extra, lost = {}, True
        is_tar = True
        name, size, kind = parse(header)
        start, padded = offset + BLOCK, -(-size // BLOCK) * BLOCK
        if kind in BEFORE_A_MEMBER:
            if size > LONGEST_NAME:
                on_damage(Damage(DAMAGED, f"a name of {size} bytes at byte {offset}"))
                lost = True
            elif kind == b"L":
                extra[b"path"] = blocks.read(start, size)
            elif kind in b"xX":
                extra |= pax_records(blocks.read(start, size))
            offset = start + padded
            continue
        name = text(extra[b"path"]) if extra.get(b"path") else name
        if kind not in WITHOUT_DATA:
            size = pax_size(extra) or size
            padded = -(-size // BLOCK) * BLOCK
            if length is not None and start + size > length:
                detail = f"{size} bytes announced, {max(length - start, 0)} there"
                on_damage(Damage(CUT_OFF, detail, name))
                return
        extra = {}
        if kind != DIRECTORY and not (kind == b"\0" and name.endswith("/")):
            yield Member(name, start, size, kind in PLAIN, lost)
            last, lost = name, False
        offset = start if kind in WITHOUT_DATA else start + padded


def is_header(block: bytes) -> bool:
    """Whether a block's checksum is that of a tar header, and its size a number."""
    if not block[0]:
        return False
    try:
        stated = octal(block[CHECKSUM])
        if octal(block[124:136]) > LARGEST:
            return False
    except ValueError:
        return False
    return stated == sum(block) - sum(block[CHECKSUM]) + 8 * ord(" ")


def next_header(blocks: Blocks, offset: int) -> tuple[tuple[int, bytes] | None, bool]:
    """The next sound header at a block's border with its place; whether only zeros come first."""
    only_zeros = True
    while piece := blocks.read(offset, blocks.at_once):
        if piece != bytes(len(piece)):
            for at in range(0, len(piece) - BLOCK + 1, BLOCK):
                block = piece[at : at + BLOCK]
                if is_header(block):
                    return (offset + at, block), only_zeros
                only_zeros = only_zeros and block == ZEROS
            only_zeros = only_zeros and not any(piece[len(piece) // BLOCK * BLOCK :])
        offset += len(piece)
    return None, only_zeros


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


def pax_records(data: bytes) -> dict[bytes, bytes]:
    """The `LENGTH key=value\\n` records of a pax header, up to one that is broken."""
    records, at = dict[bytes, bytes](), 0
    while at < len(data):
        length = data[at : at + 8].partition(b" ")[0]
        end = at + int(length) if length.isdigit() else 0
        if not at + len(length) < end <= len(data):
            break
        key, _, value = data[at + len(length) + 1 : end - 1].partition(b"=")
        records[key] = value
        at = end
    return records


def pax_size(records: Mapping[bytes, bytes]) -> int | None:
    """The size of a member that is too large for the header's own field."""
    stated = records.get(b"size", b"")
    size = int(stated) if stated.isdigit() and len(stated) < 20 else None
    return size if size is not None and size <= LARGEST else None


def shown(name: str) -> str:
    """A name as messages may hold it: archives come from anywhere, terminals obey some bytes."""
    return name if name.isprintable() else ascii(name)
