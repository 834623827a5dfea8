"""Hostile data: shards, the indexes beside them, folders and tables of pictures."""

import io
import json
import os
import struct
import tarfile
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from safetensors.torch import save

from asymlift.data.catalog import indexed
from asymlift.data.table import index_path, load_table, save_table
from tests.data.small_shards import raw_tar
from tests.reliability.attack_models import TENSOR_FILES
from tests.reliability.attacks import (
    BAD_DATA,
    DEEP,
    DONE,
    LOOK,
    Attack,
    Built,
    Command,
    Orders,
    small_setting,
)
from tests.reliability.jail import Cell

Members = list[tuple[str, bytes]]
EPS = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 40 40\n(%pipe%touch SENTINEL) (w) file\n%%EOF\n"
SVG = (
    b'<svg xmlns="http://www.w3.org/2000/svg" width="40" height="40"><script>alert(1)</script>'
    b'<image href="file:///etc/passwd"/></svg>'
)
MARKUP = "</title><script>alert(1)</script>\"'><img src=x onerror=alert(1)>&lt;\x1b]0;x\x07"


def chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def png(width: int, height: int, *more: bytes, rows: bytes = b"") -> bytes:
    head = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0))
    size = min((3 * width + 1) * height, 1 << 20)
    body = chunk(b"IDAT", rows or zlib.compress(bytes(size), 9))
    return b"\x89PNG\r\n\x1a\n" + head + b"".join(more) + body + chunk(b"IEND", b"")


def bomb(megabytes: int = 512) -> bytes:
    packer = zlib.compressobj(9)
    zeros = bytes(1 << 20)
    return b"".join(packer.compress(zeros) for _ in range(megabytes)) + packer.flush()


SMALL = png(40, 40)
PICTURES: dict[str, Callable[[Cell], bytes]] = {
    "of 60000 x 60000": lambda cell: png(60_000, 60_000),
    "of 2^31 x 2^31": lambda cell: png(2**31 - 1, 2**31 - 1),
    "of 8192 x 8192, nearly all missing": lambda cell: png(8192, 8192),
    "with a zTXt bomb": lambda cell: png(40, 40, chunk(b"zTXt", b"a\0\0" + bomb())),
    "with an iTXt bomb": lambda cell: png(40, 40, chunk(b"iTXt", b"a\0\1\0\0\0" + bomb())),
    "with an iCCP bomb": lambda cell: png(40, 40, chunk(b"iCCP", b"a\0\0" + bomb())),
    "whose pixels are a bomb": lambda cell: png(40, 40, rows=bomb()),
    "that is EPS": lambda cell: EPS.replace(b"SENTINEL", str(cell.sentinel).encode()),
    "that is SVG": lambda cell: SVG,
    "that is a pickle": lambda cell: cell.pickle(),
    "that is a GIF": lambda cell: b"GIF89a" + b"\xff" * 400,
}


def shard_orders(cell: Cell, built: Built, shard: Path, *commands: str) -> Orders:
    """Commands on the shard, beside plenty that is sound: they end well, and name what is bad."""
    shards = [str(shard), str(built.folder / "shards/000001.tar")]
    out = {"source": shards, "out": str(cell.out / "shards"), "shard_samples": 64}
    data = {"train": shards, "max_bad_fraction": 1.0, "resize": {"sides": [32]}}
    path = built.write(cell, data=data, prepare=out, basis={"images": 8, "holdout": 4})
    if "finetune" in commands:
        built.run(cell, "lifted")
    orders: dict[str, tuple[Command, tuple[int, ...]]] = {
        "inspect": (["inspect", shard], LOOK),
        "verify": (["verify", shard], LOOK),
        "fit-basis": (["fit-basis", path], (DONE,)),
        "prepare": (["prepare", path], (DONE,)),
        "finetune": (["finetune", path, *small_setting("finetune.steps=1")], (DONE,)),
    }
    return [orders[command] for command in commands or ("inspect", "verify")]


PICKLES = ("pkl", "pyd", "pickle", "pth", "npy", "pt", "latent.pkl", "py", "latents.npz")
KEYS = (
    *("../../victims/a.png", "/victims/b.png", "..\\..\\victims\\c.png", "/etc/d.png", "C:\\e.png"),
    *("./../f.png", "..png", "g/../../victims/h.png", "\x1b]0;x\x07.png", "~/i.png", "$(id).png"),
)
FACT_TEXTS = {
    "deeply nested": b"[" * DEEP,
    "a number of many digits": b'{"width": ' + b"9" * 100_000 + b"}",
    "huge sizes": b'{"width": 1000000000000, "height": 1e999}',
    "captions of words": b'{"captions": [[1], {"a": 2}]}',
}
GROWING = {
    "latent": torch.zeros(1, 40_000, 1).to(torch.float8_e4m3fn),
    "latent.scale": torch.ones(1, 1, 40_000),
}


def hostile_members() -> Iterator[tuple[str, Callable[[Cell], Members]]]:
    """(what it is, the members of a shard with it)"""
    yield (
        "pickles beside pictures",
        lambda cell: [("a.png", SMALL), *((f"a.{suffix}", cell.pickle()) for suffix in PICKLES)],
    )
    yield "paths for keys", lambda cell: [(key, SMALL) for key in KEYS]
    for name, picture in PICTURES.items():
        yield (
            f"a picture {name}",
            lambda cell, picture=picture: [("a.png", picture(cell)), ("b.jpg", picture(cell))],
        )
    for name, content in TENSOR_FILES.items():
        if "90 MB" not in name:
            yield (
                f"a latent, {name}",
                lambda cell, content=content: [
                    ("a.png", SMALL),
                    ("a.latent.safetensors", content(cell) or b"0"),
                    ("b.png", SMALL),
                    ("b.text.safetensors", content(cell) or b"0"),
                ],
            )
    yield (
        "a latent that grows by its scales",
        lambda cell: [("a.png", SMALL), ("a.latent.safetensors", save(GROWING))],
    )
    for name, text in FACT_TEXTS.items():
        yield f"facts, {name}", lambda cell, text=text: [("a.png", SMALL), ("a.json", text)]
    lists = b'{"a":[' + b"[]," * 15_000_000 + b"[]]}"
    yield "facts of 45 MB of lists", lambda cell: [("a.png", SMALL), ("a.json", lists)]
    words = b"x " * (22 << 20)
    yield "a caption of 45 MB", lambda cell: [("a.png", SMALL), ("a.txt", words)]
    yield (
        "markup in captions and keys",
        lambda cell: [("a.png", SMALL), ("a.txt", MARKUP.encode()), ("<b>.png", SMALL)],
    )


def shard_attacks() -> Iterator[Attack]:
    for name, members in hostile_members():

        def alone(cell: Cell, built: Built, members: Callable[[Cell], Members] = members) -> Orders:
            shard = raw_tar(cell.inputs / "0.tar", members(cell), tarfile.GNU_FORMAT)
            return shard_orders(cell, built, shard)

        yield Attack(f"shard, {name}", alone)

    def together(cell: Cell, built: Built) -> Orders:
        everything = [
            (key if "/" in key or "\\" in key else f"{number}-{key}", data)
            for number, (_, members) in enumerate(hostile_members())
            for key, data in members(cell)
        ]
        shard = raw_tar(cell.inputs / "0.tar", everything, tarfile.GNU_FORMAT)
        return shard_orders(cell, built, shard, "fit-basis", "prepare", "finetune")

    yield Attack("shard, all of this at once", together)

    def linked(cell: Cell, built: Built) -> Orders:
        kinds = (tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.CHRTYPE, tarfile.FIFOTYPE)
        with tarfile.open(cell.inputs / "0.tar", "w") as tar:
            for number, kind in enumerate(kinds):
                info = tarfile.TarInfo(f"{number}.png")
                info.type, info.linkname = kind, f"{cell.victims}/file"
                tar.addfile(info)
            info = tarfile.TarInfo("z.png")
            info.size = len(SMALL)
            tar.addfile(info, io.BytesIO(SMALL))
        return shard_orders(cell, built, cell.inputs / "0.tar")

    yield Attack("shard, links and devices", linked)

    def huge(cell: Cell, built: Built) -> Orders:
        """A member, and a name, that claim to be as large as a number can be."""
        shard = raw_tar(cell.inputs / "0.tar", [("a.png", SMALL)])
        for kind in (b"0", b"L", b"x"):
            info = tarfile.TarInfo("b.png")
            info.size, info.type = 1 << 62, kind
            data = shard.read_bytes()
            shard.write_bytes(info.tobuf(tarfile.GNU_FORMAT) + data)
        return shard_orders(cell, built, shard)

    yield Attack("shard, sizes of 2^62", huge)

    def endless(cell: Cell, built: Built) -> Orders:
        (cell.inputs / "0.tar").symlink_to("/dev/zero")
        return shard_orders(cell, built, cell.inputs / "0.tar")

    yield Attack("shard, a device", endless)


def index_attacks() -> Iterator[Attack]:
    """An index is believed where it fits its shard, so it must not be able to do anything."""

    def attack(name: str, spoil: Callable[[Cell, Path], object]) -> Attack:
        def prepare(cell: Cell, built: Built) -> Orders:
            shard = raw_tar(cell.inputs / "0.tar", [("a.png", SMALL), ("a.txt", b"x")])
            indexed(shard)
            spoil(cell, shard)
            path = built.write(cell, data={"train": str(shard), "resize": {"sides": [32]}})
            orders = shard_orders(cell, built, shard)
            return [*orders, (["fit-basis", path], (BAD_DATA, DONE))]

        return Attack(f"index, {name}", prepare)

    for name, content in TENSOR_FILES.items():
        if "90 MB" not in name:
            yield attack(
                name,
                lambda cell, shard, content=content: index_path(shard).write_bytes(content(cell)),
            )

    def span(offset: int, size: int) -> Callable[[Cell, Path], None]:
        def spoil(cell: Cell, shard: Path) -> None:
            table = load_table(shard, index_path(shard))
            assert table is not None
            for column in table.spans.values():
                column[:] = (offset, size)
            save_table(table, index_path(shard))

        return spoil

    yield attack("parts of 2^40 bytes", span(0, 1 << 40))
    yield attack("parts of 2^62 bytes", span(0, 1 << 62))
    yield attack("parts behind the end", span(1 << 62, 10))
    yield attack("parts of less than nothing", span(512, -5))

    def key(words: bytes) -> Callable[[Cell, Path], None]:
        def spoil(cell: Cell, shard: Path) -> None:
            table = load_table(shard, index_path(shard))
            assert table is not None
            object.__setattr__(table, "blob", words)
            table.ends[:] = len(words)
            save_table(table, index_path(shard))

        return spoil

    yield attack("a key that leads out", key(b"../../victims/file"))
    yield attack("a key that is no text", key(b"\xff\xfe"))

    def ends(cell: Cell, shard: Path) -> None:
        table = load_table(shard, index_path(shard))
        assert table is not None
        table.ends[:] = 1 << 40
        save_table(table, index_path(shard))

    yield attack("keys without end", ends)

    def empty(cell: Cell, shard: Path) -> None:
        table = load_table(shard, index_path(shard))
        assert table is not None
        object.__setattr__(table, "spans", {})
        object.__setattr__(table, "sizes", table.sizes[:0])
        save_table(table, index_path(shard))

    yield attack("columns that are missing", empty)


# ---- folders and tables ------------------------------------------------------------------------


def listing_orders(cell: Cell, built: Built, source: Path, *, ends: tuple[int, ...]) -> Orders:
    out = {"source": str(source), "out": str(cell.out / "shards")}
    data = {"train": str(source), "max_bad_fraction": 1.0, "resize": {"sides": [32]}}
    path = built.write(cell, data=data, prepare=out)
    return [(["inspect", source], LOOK), (["prepare", path], ends)]


def listing_attacks() -> Iterator[Attack]:
    def folder(cell: Cell, built: Built) -> Orders:
        place = cell.inputs / "pictures"
        place.mkdir()
        (place / "a.png").write_bytes(SMALL)
        (place / "a.txt").write_text(MARKUP)
        for number, target in enumerate(("/dev/zero", cell.victims / "file", place, "nowhere")):
            (place / f"link{number}.png").symlink_to(target)
        (place / "text.png").write_bytes(SMALL)
        (place / "text.txt").symlink_to("/dev/zero")
        (place / "loop").symlink_to(place)
        os.mkfifo(place / "pipe.png")
        (place / "fed.png").write_bytes(SMALL)
        os.mkfifo(place / "fed.txt")
        for name, picture in PICTURES.items():
            (place / f"{name}.png").write_bytes(picture(cell))
        return listing_orders(cell, built, place, ends=(DONE,))

    yield Attack("folder, links, devices, pipes and bombs", folder)

    def rows(cell: Cell) -> list[str]:
        (cell.inputs / "a.png").write_bytes(SMALL)
        os.mkfifo(cell.inputs / "p.png")
        os.mkfifo(cell.inputs / "fed.png")
        (cell.inputs / "zero.png").symlink_to("/dev/zero")
        return [
            "a.png",
            "../victims/file",
            str(cell.victims / "file.png"),
            "/dev/zero",
            "zero.png",
            "p.png",
            "/etc/passwd",
            f"pipe:{cell.command}",
            "https://user:pw@localhost:1/a.png",
            "file:///etc/passwd",
            "\0.png",
            "a" * 5000 + ".png",
        ]

    def jsonl(cell: Cell, built: Built) -> Orders:
        table = cell.inputs / "t.jsonl"
        lines = [json.dumps({"file_name": name, "caption": MARKUP}) for name in rows(cell)]
        lines += ["[" * DEEP, '{"file_name": ' + "9" * 100_000 + "}", '{"file_name": [[]]}']
        lines += ['{"file_name": "a.png", "caption": ["\\ud800"]}']
        table.write_text("\n".join(lines))
        return listing_orders(cell, built, table, ends=(DONE,))

    yield Attack("table, JSON lines that lead everywhere", jsonl)

    def comma(cell: Cell, built: Built) -> Orders:
        table = cell.inputs / "t.csv"
        lines = [f'"{name}","x"' for name in rows(cell) if "\0" not in name]
        table.write_text("\n".join(["file_name,caption", *lines, '"a.png","' + "x" * 200_000]))
        return listing_orders(cell, built, table, ends=(DONE,))

    yield Attack("table, comma-separated", comma)

    def parquet(cell: Cell, built: Built) -> Orders:
        table = cell.inputs / "t.parquet"
        table.write_bytes(b"PAR1" + cell.pickle() + b"\xff\xff\xff\x7fPAR1")
        return listing_orders(cell, built, table, ends=(BAD_DATA,))

    yield Attack("table, Parquet that is a pickle", parquet)

    def endless(cell: Cell, built: Built) -> Orders:
        (cell.inputs / "t.jsonl").symlink_to("/dev/zero")
        return listing_orders(cell, built, cell.inputs / "t.jsonl", ends=(BAD_DATA,))

    yield Attack("table, a device", endless)
