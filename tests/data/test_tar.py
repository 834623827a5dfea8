"""Tar headers: what `tarfile` reads of a sound archive, and what is left of a damaged one."""

import io
import random
import shutil
import subprocess
import tarfile
import time
from pathlib import Path

import pytest

from asymlift.data.tar import (
    BLOCK,
    CUT_OFF,
    DAMAGED,
    NO_TAR,
    Damage,
    FileBlocks,
    Member,
    StreamBlocks,
    scan,
)

FORMATS = {"ustar": tarfile.USTAR_FORMAT, "gnu": tarfile.GNU_FORMAT, "pax": tarfile.PAX_FORMAT}
LONG = "directory/" * 9 + "n" * 90  # 180 characters: ustar splits it into a prefix and a name
CONTENT = [
    ("a.png", b"x" * 700),
    ("a.txt", b""),
    ("b.png", b"y" * BLOCK),
    ("b.txt", b"hello"),
    ("c.png", b"z" * (3 * BLOCK + 1)),
    ("c.txt", b"bye"),
]


def make(path: Path, content: list[tuple[str, bytes]], kind: int = tarfile.USTAR_FORMAT) -> Path:
    with tarfile.open(path, "w", format=kind) as tar:
        for name, data in content:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return path


def scanned(path: Path) -> tuple[list[Member], list[Damage]]:
    damages: list[Damage] = []
    with path.open("rb") as file:
        length = path.stat().st_size
        return list(scan(FileBlocks(file.fileno()), damages.append, length=length)), damages


def names(path: Path) -> list[str]:
    return [member.name for member in scanned(path)[0]]


def by_tarfile(path: Path) -> list[Member]:
    with tarfile.open(path) as tar:
        return [Member(m.name, m.offset_data, m.size, m.isreg()) for m in tar if not m.isdir()]


def header_of(name: str, size: int = 0, kind: bytes = tarfile.REGTYPE, **more: str) -> bytes:
    info = tarfile.TarInfo(name)
    info.size, info.type = size, kind
    info.linkname = more.get("link", "")
    return info.tobuf(tarfile.GNU_FORMAT)


def with_checksum(header: bytes) -> bytes:
    blank = header[:148] + b" " * 8 + header[156:]
    return header[:148] + b"%06o\0 " % sum(blank) + header[156:]


# ---- sound archives ------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", FORMATS)
def test_members_are_those_of_tarfile(tmp_path, kind):
    extra = [(LONG, b"far"), ("\u00e9t\u00e9.txt", b"summer"), ("d" * 100 + ".txt", b"1")]
    if kind == "ustar":
        extra.pop()  # has no place for it
    path = make(tmp_path / "a.tar", [*CONTENT, *extra], FORMATS[kind])
    assert scanned(path) == (by_tarfile(path), [])


@pytest.mark.skipif(shutil.which("tar") is None, reason="needs the tar command")
@pytest.mark.parametrize("kind", ["v7", "oldgnu", "gnu", "ustar", "posix"])
def test_members_are_those_of_an_archive_by_gnu_tar(tmp_path, kind):
    folder = tmp_path / "f"
    (folder / "inside").mkdir(parents=True)
    for name, data in CONTENT:
        (folder / name).write_bytes(data)
    (folder / "inside" / "d.txt").write_bytes(b"deep")
    if kind not in ("v7", "ustar"):
        (folder / ("k" * 150 + ".txt")).write_bytes(b"long")
        (folder / "link").symlink_to("t" * 150)  # a long name of what it points to
    command = [
        "tar",
        f"--format={kind}",
        "-cf",
        "../a.tar",
        *sorted(p.name for p in folder.iterdir()),
    ]
    subprocess.run(command, cwd=folder, check=True)
    assert scanned(tmp_path / "a.tar") == (by_tarfile(tmp_path / "a.tar"), [])


@pytest.mark.parametrize("kind", [*FORMATS])
def test_folders_are_passed_over_and_links_are_no_plain_files(tmp_path, kind):
    with tarfile.open(tmp_path / "a.tar", "w", format=FORMATS[kind]) as tar:
        for name, what in (
            ("folder", tarfile.DIRTYPE),
            ("hard.txt", tarfile.LNKTYPE),
            ("soft.txt", tarfile.SYMTYPE),
            ("pipe.txt", tarfile.FIFOTYPE),
            ("old.txt", tarfile.CONTTYPE),
        ):
            info = tarfile.TarInfo(name)
            info.type, info.linkname = what, "t" * (150 if kind != "ustar" else 5)
            tar.addfile(info)
    members, damages = scanned(tmp_path / "a.tar")
    plain = {member.name: member.plain for member in members}
    assert plain == {"hard.txt": False, "soft.txt": False, "pipe.txt": False, "old.txt": True}
    assert not damages


def test_a_folder_as_old_tars_write_it_is_one(tmp_path):
    old = with_checksum(header_of("folder/", kind=tarfile.AREGTYPE))
    (tmp_path / "a.tar").write_bytes(old + header_of("a.txt") + bytes(2 * BLOCK))
    assert names(tmp_path / "a.tar") == ["a.txt"]


def test_a_member_of_an_unknown_kind_is_passed_over_with_its_data(tmp_path):
    data = header_of("inner.txt")  # looks like a header
    head = header_of("odd.txt", len(data), b"Q")
    whole = head + data + header_of("b.txt", 2) + b"hi".ljust(BLOCK, b"\0") + bytes(2 * BLOCK)
    (tmp_path / "a.tar").write_bytes(whole)
    members, damages = scanned(tmp_path / "a.tar")
    assert [(m.name, m.plain) for m in members] == [("odd.txt", False), ("b.txt", True)]
    assert not damages


@pytest.mark.parametrize("kind", ["gnu", "pax"])
def test_a_member_of_more_than_eight_gigabytes(tmp_path, kind):
    """Its size is base 256 in GNU's headers, and in a header of its own in pax."""
    size = 9 << 30
    info = tarfile.TarInfo("big.txt")
    info.size = size
    head = info.tobuf(FORMATS[kind])
    with (tmp_path / "a.tar").open("wb") as file:
        file.write(head)
        file.seek(len(head) + size)  # a hole
        file.write(header_of("b.txt") + bytes(2 * BLOCK))
    members, damages = scanned(tmp_path / "a.tar")
    assert [(m.name, m.size) for m in members] == [("big.txt", size), ("b.txt", 0)]
    assert not damages


def test_what_a_pax_header_says_is_about_the_next_member_only(tmp_path):
    path = make(tmp_path / "a.tar", [("k" * 150, b"1"), ("b.txt", b"2")], tarfile.PAX_FORMAT)
    assert names(path) == ["k" * 150, "b.txt"]
    with tarfile.open(path, "w", pax_headers={"comment": "for all"}) as tar:
        tar.addfile(tarfile.TarInfo("a.txt"))
    assert names(path) == ["a.txt"]


@pytest.mark.parametrize(
    "record",
    [b"", b"x path=y\n", b"0 path=y\n", b"99999999999 path=y\n", b"5\n", b"999 path=long.txt\n",
     b"10 size=x\n", b"33 size=99999999999999999999999\n"],
)  # fmt: skip
def test_a_broken_pax_header_says_nothing(tmp_path, record):
    head = header_of("pax", len(record), tarfile.XHDTYPE) + (
        record.ljust(BLOCK, b"\0") if record else b""
    )
    body = header_of("a.txt", 2) + b"hi".ljust(BLOCK, b"\0")
    (tmp_path / "a.tar").write_bytes(head + body + bytes(2 * BLOCK))
    members, damages = scanned(tmp_path / "a.tar")
    assert [(m.name, m.size) for m in members] == [("a.txt", 2)]
    assert not damages


def test_an_archive_without_members_is_empty_and_sound(tmp_path):
    assert scanned(make(tmp_path / "a.tar", [])) == ([], [])


@pytest.mark.parametrize("kind", FORMATS)
def test_a_stream_gives_what_the_file_gives(tmp_path, kind):
    path = make(tmp_path / "a.tar", CONTENT, FORMATS[kind])
    whole = bytearray(path.read_bytes())
    whole[by_tarfile(path)[2].offset - BLOCK] ^= 1
    for data in (path.read_bytes(), bytes(whole), b"", b"<html>" * 900):
        path.write_bytes(data)
        damages: list[Damage] = []
        blocks = StreamBlocks(Trickle(data))
        assert (list(scan(blocks, damages.append)), damages) == scanned(path)


class Trickle(io.BytesIO):
    """A connection that never gives as much as it is asked for."""

    def read(self, count: int | None = -1, /) -> bytes:
        return super().read(count if count is None or count < 0 else min(count, 100))


def test_the_data_of_a_member_can_be_read_between_headers(tmp_path):
    path = make(tmp_path / "a.tar", CONTENT)
    blocks = StreamBlocks(io.BytesIO(path.read_bytes()))
    found = [(m.name, blocks.read(m.offset, m.size)) for m in scan(blocks, lambda damage: None)]
    assert found == CONTENT


# ---- damaged archives ----------------------------------------------------------------------------


@pytest.fixture
def archive(tmp_path: Path) -> Path:
    return make(tmp_path / "a.tar", CONTENT)


def test_a_cut_at_any_block_keeps_what_is_whole_and_says_so(archive):
    whole, members = archive.read_bytes(), by_tarfile(archive)
    end = members[-1].offset + BLOCK
    for place in [*range(0, end, BLOCK), *range(7, end, BLOCK)]:
        archive.write_bytes(whole[:place])
        found, (damage,) = scanned(archive)
        assert found == [m for m in members if m.offset + m.size <= place], place
        assert damage.reason == (CUT_OFF if place >= BLOCK else NO_TAR)
        inside = [m.name for m in members if m.offset <= place < m.offset + m.size]
        assert [damage.name] == (inside or [""])


def test_one_block_of_zeros_is_enough_of_an_end(archive):
    end = by_tarfile(archive)[-1].offset + BLOCK
    archive.write_bytes(archive.read_bytes()[: end + BLOCK])
    assert scanned(archive) == (by_tarfile(archive), [])


SPOILT = {
    "zeros": bytes(BLOCK),
    "noise": random.Random(0).randbytes(BLOCK),
    "ones": b"\xff" * BLOCK,
}


@pytest.mark.parametrize("what", SPOILT)
@pytest.mark.parametrize("which", range(len(CONTENT)))
def test_a_lost_header_costs_its_member_and_no_other(archive, what, which):
    members, whole = by_tarfile(archive), bytearray(archive.read_bytes())
    place = members[which].offset - BLOCK
    whole[place : place + BLOCK] = SPOILT[what]
    archive.write_bytes(whole)
    found, damages = scanned(archive)
    rest = [member.name for member in members if member is not members[which]]
    assert [member.name for member in found] == rest
    assert [damage.reason for damage in damages] == [DAMAGED]
    after = [member.name for member in found if member.after_damage]
    assert after == [member.name for member in members[which + 1 : which + 2]]
    if which:
        assert members[which - 1].name in damages[0].detail


def test_zeros_over_the_last_members_are_not_taken_for_the_end(archive):
    members, whole = by_tarfile(archive), bytearray(archive.read_bytes())
    start = members[4].offset - BLOCK
    whole[start : start + 2 * BLOCK] = bytes(2 * BLOCK)
    whole[members[5].offset - BLOCK : members[5].offset] = bytes(BLOCK)
    archive.write_bytes(whole)
    found, damages = scanned(archive)
    assert found == members[:4]
    assert damages == [Damage(DAMAGED, f"no header at byte {start}, after b.txt")]


def test_any_flipped_bit_in_a_header_is_noticed_or_changes_nothing(archive):
    members, whole, draw = by_tarfile(archive), archive.read_bytes(), random.Random(0)
    for _ in range(400):
        data = bytearray(whole)
        place = draw.choice(members).offset - BLOCK + draw.randrange(BLOCK)
        data[place] ^= 1 << draw.randrange(8)
        archive.write_bytes(data)
        found, damages = scanned(archive)
        assert damages or found == members  # the padding of the checksum itself


@pytest.mark.parametrize("size", [b"\xff" * 11 + b"\0", b"\x80" + b"\x7f" * 11, b"99999999999\0"])
def test_a_size_that_none_can_be_is_damage_even_under_a_right_checksum(archive, size):
    members, whole = by_tarfile(archive), bytearray(archive.read_bytes())
    place = members[2].offset - BLOCK
    header = bytes(whole[place : place + BLOCK])
    whole[place : place + BLOCK] = with_checksum(header[:124] + size + header[136:])
    archive.write_bytes(whole)
    found, damages = scanned(archive)
    assert [member.name for member in found] == ["a.png", "a.txt", "b.txt", "c.png", "c.txt"]
    assert [damage.reason for damage in damages] == [DAMAGED]


@pytest.mark.parametrize("kind", [tarfile.GNUTYPE_LONGNAME, tarfile.XHDTYPE, b"Q"])
def test_a_size_beyond_the_file_is_damage_whatever_has_it(tmp_path, kind):
    (tmp_path / "a.tar").write_bytes(header_of("a.txt") + header_of("x", 1 << 50, kind))
    found, damages = scanned(tmp_path / "a.tar")
    assert [member.name for member in found] == ["a.txt"]
    assert damages[-1].reason == CUT_OFF
    if kind != b"Q":
        assert f"a name of {1 << 50} bytes" in damages[0].detail


@pytest.mark.parametrize(
    ("data", "detail"),
    [
        (b"", "an empty file"),
        (b"x" * 100, "100 bytes"),
        (b"<html>404</html>" * 90, "no header at byte 0"),
        (random.Random(0).randbytes(9999), "no header at byte 0"),
    ],
)
def test_what_is_no_tar_is_called_so(tmp_path, data, detail):
    (tmp_path / "a.tar").write_bytes(data)
    assert scanned(tmp_path / "a.tar") == ([], [Damage(NO_TAR, detail)])


def test_names_in_messages_cannot_move_the_cursor(tmp_path):
    path = make(tmp_path / "a.tar", [("bad\x1b[2J.png", b"x")])
    path.write_bytes(path.read_bytes()[: 2 * BLOCK])
    (_, (damage,)) = scanned(path)
    assert damage.detail.isprintable()


def test_a_tail_is_looked_for_in_large_pieces(tmp_path):
    """64 MB without a header take about as long as reading them."""
    (tmp_path / "a.tar").write_bytes(b"\x01" * (1 << 26))
    started = time.monotonic()
    assert scanned(tmp_path / "a.tar")[1][0].reason == NO_TAR
    assert time.monotonic() - started < 5


def test_random_damage_costs_what_it_touches_and_no_more(tmp_path):
    """Flips, zeros, noise, cuts, pieces left out or doubled: never a crash, never a false span."""
    content = [
        (f"{number:03d}{suffix}", random.Random(number).randbytes(number * 37 % 1900))
        for number in range(40)
        for suffix in (".png", ".txt")
    ]
    path, draw = make(tmp_path / "a.tar", content), random.Random(1)
    whole, members, started = path.read_bytes(), by_tarfile(path), time.monotonic()
    last = members[-1].offset + members[-1].size - 1  # never touched: nobody can miss what follows
    for _ in range(600):
        data, touched = spoilt(draw, whole, last)
        path.write_bytes(data)
        found, damages = scanned(path)
        assert all(m.offset >= 0 and m.offset + m.size <= len(data) for m in found)
        read = {m.name: data[m.offset : m.offset + m.size] for m in found}
        if touched is not None:  # the others are where they were
            assert damages or dict(content).keys() <= read.keys()
            for member, (name, inside) in zip(members, content, strict=True):
                untouched = range(member.offset - BLOCK, member.offset + member.size)
                if untouched.stop <= touched.start or touched.stop <= untouched.start:
                    assert read[name] == inside
    assert time.monotonic() - started < 60


def spoilt(draw: random.Random, whole: bytes, last: int) -> tuple[bytes, range | None]:
    """Damaged bytes, and the bytes that were touched; None where the others moved."""
    start = draw.randrange(last)
    length = draw.choice([1, 8, BLOCK, 8 * BLOCK, draw.randrange(1, 20_000)])
    touched = range(start, min(start + length, last))
    before, inside, after = whole[:start], whole[start : touched.stop], whole[touched.stop :]
    match draw.choice(["flip", "zeros", "noise", "cut", "left out", "doubled"]):
        case "flip":
            return before + bytes([inside[0] ^ 1 << draw.randrange(8)]) + whole[
                start + 1 :
            ], touched
        case "zeros":
            return before + bytes(len(inside)) + after, touched
        case "noise":
            return before + draw.randbytes(len(inside)) + after, touched
        case "cut":
            return before, range(start, len(whole))
        case "left out":
            return before + after, None
        case _:
            return before + inside + inside + after, None
