"""Difficult inputs for the reader, and what must become of each.

Everything is made from raw bytes, tarfile, Pillow and numpy, and every expected picture is
computed here: nothing that is to be judged takes part.

Shapes: pictures (H, W, 3) uint8, latents (C, h, w).
"""

import io
import json
import struct
import tarfile
import zlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from itertools import pairwise
from pathlib import Path
from typing import Literal

import numpy as np
from PIL import Image
from safetensors.numpy import save as to_safetensors

from asymlift.data.records import CAPTION, FACTS, LATENT, TEXT

REASONS = {
    # a picture
    "foreign": "not a JPEG, PNG or WebP image",
    "broken": "image cannot be decoded",
    "huge": "too many pixels",
    "tiny": "smaller than one patch",
    "too small": "too small",  # `prepare` says it so
    "too elongated": "too elongated",
    # a sample
    "empty": "empty member",
    "path": "key with a path in it",
    "link": "not a plain file",
    "suffix twice": "duplicate suffix",
    "key twice": "duplicate key",
    "two images": "two images",
    "no image": "no image",
    "caption": "caption is not UTF-8",
    "facts": "facts are not a JSON object",
    "facts size": "wrong size in the facts",
    "latent file": "latent is not a safetensors file",
    "latent shape": "latent has the wrong shape",
    "latent channels": "latent has the wrong number of channels",
    "latent dtype": "latent has the wrong dtype",
    "latent values": "latent holds NaN or infinity",
    "text file": "text is not a safetensors file",
    "text values": "text holds NaN or infinity",
    "text width": "text embedding does not fit",
    "no text": "no text embedding",
    # a shard
    "damaged": "shard is damaged",
    "cut off": "shard is cut off",
    "no tar": "not a tar",
    "missing": "shard is missing",
}

BLOCK = tarfile.BLOCKSIZE
Shape = tuple[int, ...]


@dataclass(frozen=True)
class Case:
    """One difficult input. Messages about it name `shard!...key...`."""

    kind: str
    verdict: Literal["accept", "refuse"]
    reason: str  # "" where it is accepted
    reason_in_prepare: str  # the same nearly everywhere
    key: str
    shard: str  # the file's name; "" in a folder
    expected: np.ndarray | None = None  # (H, W, 3) uint8, what the model must see
    tolerance: int = 0  # levels, of the worst channel of the worst pixel
    caption: str = ""  # what must be read, where it is accepted

    def agrees(self, image: np.ndarray) -> bool:
        return differ(self.expected, image) <= self.tolerance


@dataclass(frozen=True)
class Plain:
    """What is nothing special, and must be read."""

    shard: str
    picture: np.ndarray
    caption: str


@dataclass(frozen=True)
class Damage:
    """A shard of plain samples in which something broke.

    A sample of which any byte broke is lost: it must never be delivered, not even without the
    part that broke. What lies behind a cut is not there to be named.
    """

    shard: str
    kind: str
    reason: str  # must be counted at least once, naming the shard
    intact: Mapping[str, Plain]
    lost: frozenset[str] = frozenset()
    either: frozenset[str] = frozenset()  # whole, but the file ends there: a reader cannot know


@dataclass(frozen=True)
class Corpus:
    paths: list[Path]  # every shard in order, the missing one too; every file of a folder
    cases: list[Case]
    plain: Mapping[str, Plain]
    damages: list[Damage] = field(default_factory=list)


def differ(expected: np.ndarray | None, image: np.ndarray) -> int:
    """The largest difference in levels; 256 where even the shapes differ."""
    if expected is None or image.shape != expected.shape:
        return 256
    return int(np.abs(image.astype(int) - expected.astype(int)).max())


# ---- pictures --------------------------------------------------------------------------------


@dataclass
class Draw:
    """The dice of one sample. `turn` counts how often its kind came before."""

    height: int
    width: int
    dice: np.random.Generator
    turn: int = 0

    def picture(self, channels: int = 3) -> np.ndarray:
        """Smooth, so that JPEG keeps it, and unlike any other."""
        coarse = self.dice.uniform(20, 235, (4, 4, channels))
        rows, columns = (np.linspace(0, 3, side) for side in (self.height, self.width))
        fine = tent(rows) @ coarse.reshape(4, -1)
        return (tent(columns) @ fine.reshape(self.height, 4, channels)).round().astype(np.uint8)

    def deep(self, channels: int) -> np.ndarray:
        """The same in 16 bits, from black to white."""
        levels = np.sort(self.dice.integers(0, 65536, (self.height * self.width, channels)), axis=0)
        levels[0], levels[-1] = 0, 65535
        return levels.reshape(self.height, self.width, channels).astype(">u2")

    def pick(self, *options: str) -> str:
        return options[self.turn % len(options)]


def tent(at: np.ndarray) -> np.ndarray:
    """Weights of linear interpolation between four points."""
    return np.clip(1 - np.abs(at[:, None] - np.arange(4)), 0, None)


@dataclass(frozen=True)
class Picture:
    """An image file, and what is to be seen in it."""

    suffix: str
    data: bytes
    expected: np.ndarray | None = None
    tolerance: int = 0


def encode(picture: Image.Image | np.ndarray, kind: str = "PNG", **options: object) -> bytes:
    stream = io.BytesIO()
    image = picture if isinstance(picture, Image.Image) else Image.fromarray(picture)
    image.save(stream, format=kind, **options)
    return stream.getvalue()


def encode_jpeg(picture: Image.Image | np.ndarray, **options: object) -> bytes:
    return encode(picture, "JPEG", quality=97, subsampling=0, **options)


def grey(levels: np.ndarray) -> np.ndarray:
    """(H, W) -> (H, W, 3)"""
    return np.repeat(levels[..., None], 3, axis=2)


def eight_bits(levels: np.ndarray) -> np.ndarray:
    return (levels / 257).round().astype(np.uint8)


def over_white(color: np.ndarray, alpha: np.ndarray) -> np.ndarray:
    """alpha (H, W) from 0 to 255"""
    share = alpha[..., None] / 255
    return (color * share + 255 * (1 - share)).round().astype(np.uint8)


JPEG_LOSS, WEBP_LOSS = 10, 32  # levels; on 360 pictures of each kind at most 7 and 26


def cmyk_jpeg(draw: Draw) -> Picture:
    rgb = draw.picture()
    ink = 255 - rgb
    black = ink.min(axis=2, keepdims=True) // 2  # half of the grey is printed in black
    color = 255 - (255 * (255 - ink.astype(int)) / (255 - black)).round().clip(0, 255)
    cmyk = np.concatenate([color, black], axis=2).astype(np.uint8)
    return Picture(".jpg", encode_jpeg(Image.fromarray(cmyk, "CMYK")), rgb, JPEG_LOSS)


def grey_jpeg(draw: Draw) -> Picture:
    levels = draw.picture()[..., 0]
    return Picture(".jpg", encode(levels, "JPEG", quality=97), grey(levels), JPEG_LOSS)


def grey_png(draw: Draw) -> Picture:
    levels = draw.picture()[..., 0]
    return Picture(".png", encode(levels), grey(levels))


def indexed(draw: Draw) -> tuple[Image.Image, np.ndarray, np.ndarray]:
    """A palette picture, its indices (H, W) and its palette (256, 3)."""
    palette = draw.dice.integers(0, 256, (256, 3), dtype=np.uint8)
    indices = draw.dice.integers(0, 256, (draw.height, draw.width), dtype=np.uint8)
    picture = Image.fromarray(indices, "P")
    picture.putpalette(palette.tobytes())
    return picture, indices, palette


def palette_png(draw: Draw) -> Picture:
    picture, indices, palette = indexed(draw)
    return Picture(".png", encode(picture), palette[indices])


def transparent_palette_png(draw: Draw) -> Picture:
    picture, indices, palette = indexed(draw)
    alpha = draw.dice.integers(0, 256, 256, dtype=np.uint8)
    alpha[:32] = 0
    data = encode(picture, transparency=alpha.tobytes())
    return Picture(".png", data, over_white(palette[indices], alpha[indices]), 1)


def alpha_of(draw: Draw) -> np.ndarray:
    """Half of the picture is hidden, the rest fades."""
    alpha = np.linspace(-255, 255, draw.height * draw.width).clip(0).astype(np.uint8)
    return alpha.reshape(draw.height, draw.width)


def la_png(draw: Draw) -> Picture:
    levels, alpha = draw.picture()[..., 0], alpha_of(draw)
    data = encode(Image.fromarray(np.stack([levels, alpha], -1), "LA"))
    return Picture(".png", data, over_white(grey(levels), alpha), 1)


def rgba_png(draw: Draw) -> Picture:
    rgb, alpha = draw.picture(), alpha_of(draw)
    return Picture(".png", encode(np.dstack([rgb, alpha])), over_white(rgb, alpha), 1)


def rgba_webp(draw: Draw) -> Picture:
    rgb, alpha = draw.picture(), alpha_of(draw)
    data = encode(np.dstack([rgb, alpha]), "WEBP", lossless=True, exact=True)
    return Picture(".webp", data, over_white(rgb, alpha), 1)


def transparent_color_png(draw: Draw) -> Picture:
    rgb = draw.picture()
    rgb[: draw.height // 2] = hidden = (250, 3, 7)  # outside of what `picture` draws
    expected = np.where((rgb == hidden).all(axis=2, keepdims=True), 255, rgb).astype(np.uint8)
    return Picture(".png", encode(rgb, transparency=hidden), expected)


def one_bit_png(draw: Draw) -> Picture:
    on = draw.picture()[..., 0] > 128
    return Picture(".png", encode(Image.fromarray(on)), grey(on.astype(np.uint8) * 255))


def deep_grey_png(draw: Draw) -> Picture:
    levels = draw.deep(1)
    data = png(levels, depth=16, color=GREY)
    return Picture(".png", data, grey(eight_bits(levels)[..., 0]), 1)


def deep_la_png(draw: Draw) -> Picture:
    levels = draw.deep(2)
    small = eight_bits(levels)
    expected = over_white(grey(small[..., 0]), small[..., 1])
    return Picture(".png", png(levels, depth=16, color=GREY_ALPHA), expected, 2)


def deep_rgb_png(draw: Draw) -> Picture:
    levels = draw.deep(3)
    return Picture(".png", png(levels, depth=16, color=RGB), eight_bits(levels), 1)


def deep_rgba_png(draw: Draw) -> Picture:
    levels = draw.deep(4)
    small = eight_bits(levels)
    expected = over_white(small[..., :3], small[..., 3])
    return Picture(".png", png(levels, depth=16, color=RGB_ALPHA), expected, 2)


# How an upright picture is stored under each EXIF orientation.
STORED: dict[int, Callable[[np.ndarray], np.ndarray]] = {
    2: lambda a: a[:, ::-1],
    3: lambda a: a[::-1, ::-1],
    4: lambda a: a[::-1],
    5: lambda a: a.transpose(1, 0, 2),
    6: lambda a: np.rot90(a),
    7: lambda a: a[::-1, ::-1].transpose(1, 0, 2),
    8: lambda a: np.rot90(a, -1),
}


def turned(draw: Draw, upright: np.ndarray) -> tuple[np.ndarray, bytes]:
    """The picture as stored, and its EXIF block: little endian, one tag."""
    orientation = 2 + draw.turn % len(STORED)
    tag = struct.pack("<HHIHH", 0x0112, 3, 1, orientation, 0)
    exif = b"Exif\0\0II*\0" + struct.pack("<IH", 8, 1) + tag + bytes(4)
    return np.ascontiguousarray(STORED[orientation](upright)), exif


def turned_jpeg(draw: Draw) -> Picture:
    rgb = draw.picture()
    stored, exif = turned(draw, rgb)
    return Picture(".jpg", encode_jpeg(stored, exif=exif), rgb, JPEG_LOSS)


def turned_webp(draw: Draw) -> Picture:
    rgb = draw.picture()
    stored, exif = turned(draw, rgb)
    return Picture(".webp", encode(stored, "WEBP", lossless=True, exif=exif), rgb)


def turned_png(draw: Draw) -> Picture:
    rgb = draw.picture()
    stored, exif = turned(draw, rgb)
    return Picture(".png", png(stored, before=chunk(b"eXIf", exif[6:])), rgb)


def png_named_jpg(draw: Draw) -> Picture:
    rgb = draw.picture()
    return Picture(draw.pick(".jpg", ".jpeg", ".webp"), encode(rgb), rgb)


def jpeg_named_png(draw: Draw) -> Picture:
    rgb = draw.picture()
    return Picture(draw.pick(".png", ".webp"), encode_jpeg(rgb), rgb, JPEG_LOSS)


def upper_case_suffix(draw: Draw) -> Picture:
    rgb = draw.picture()
    return Picture(draw.pick(".JPG", ".JPEG", ".Jpg"), encode_jpeg(rgb), rgb, JPEG_LOSS)


def animated(draw: Draw, kind: str, **options: object) -> tuple[bytes, np.ndarray]:
    rgb = draw.picture()
    others = [Image.fromarray(draw.picture()) for _ in range(2)]
    data = encode(rgb, kind, save_all=True, append_images=others, duration=40, **options)
    return data, rgb


def animated_webp(draw: Draw) -> Picture:
    return Picture(".webp", *animated(draw, "WEBP", lossless=True))


def animated_png(draw: Draw) -> Picture:
    return Picture(".png", *animated(draw, "PNG"))


def progressive_jpeg(draw: Draw) -> Picture:
    rgb = draw.picture()
    return Picture(".jpg", encode_jpeg(rgb, progressive=True), rgb, JPEG_LOSS)


def jpeg_with_a_tail(draw: Draw) -> Picture:
    rgb = draw.picture()
    return Picture(".jpg", encode_jpeg(rgb) + draw.dice.bytes(3000), rgb, JPEG_LOSS)


def lossless_webp(draw: Draw) -> Picture:
    rgb = draw.picture()
    return Picture(".webp", encode(rgb, "WEBP", lossless=True), rgb)


def lossy_webp(draw: Draw) -> Picture:
    rgb = draw.picture()
    return Picture(".webp", encode(rgb, "WEBP", quality=95), rgb, WEBP_LOSS)


def profiled_jpeg(draw: Draw) -> Picture:
    rgb = draw.picture() // 4 + 96  # pale: inside sRGB
    data = encode_jpeg(rgb, icc_profile=wide_profile())
    return Picture(".jpg", data, wide_to_srgb(rgb), JPEG_LOSS + 4)


def profiled_png(draw: Draw) -> Picture:
    rgb = draw.picture() // 4 + 96
    return Picture(".png", encode(rgb, icc_profile=wide_profile()), wide_to_srgb(rgb), 2)


# Primaries in XYZ under D50: of sRGB, and of the colour space called Adobe RGB (1998).
SRGB = np.array(
    [[0.43607, 0.38515, 0.14307], [0.22249, 0.71687, 0.06061], [0.01392, 0.09708, 0.7141]]
)
WIDE = np.array(
    [[0.60974, 0.20528, 0.14919], [0.31111, 0.62567, 0.06322], [0.01947, 0.06087, 0.74457]]
)
WIDE_GAMMA = 563 / 256


def wide_to_srgb(rgb: np.ndarray) -> np.ndarray:
    light = (rgb / 255) ** WIDE_GAMMA @ (np.linalg.inv(SRGB) @ WIDE).T
    light = light.clip(0, 1)
    levels = np.where(light <= 0.0031308, 12.92 * light, 1.055 * light ** (1 / 2.4) - 0.055)
    return (255 * levels).round().astype(np.uint8)


@cache
def wide_profile() -> bytes:
    """An ICC 2.1 display profile: three primaries and a gamma."""

    def fixed(*numbers: float) -> bytes:
        return struct.pack(f">{len(numbers)}i", *(round(number * 65536) for number in numbers))

    name, white = b"wide gamut for tests\0", (0.9642, 1.0, 0.82491)
    tags = {
        b"desc": b"desc" + struct.pack(">II", 0, len(name)) + name + bytes(78),
        b"cprt": b"text" + bytes(4) + b"none\0",
        b"wtpt": b"XYZ " + bytes(4) + fixed(*white),
    }
    for column, letter in enumerate((b"r", b"g", b"b")):
        tags[letter + b"XYZ"] = b"XYZ " + bytes(4) + fixed(*WIDE[:, column])
        tags[letter + b"TRC"] = b"curv" + struct.pack(">IIH", 0, 1, round(WIDE_GAMMA * 256))
    table, body, start = b"", b"", 128 + 4 + 12 * len(tags)
    for tag, data in tags.items():
        table += tag + struct.pack(">II", start + len(body), len(data))
        body += data + bytes(-len(data) % 4)
    head = struct.pack(
        ">I4sI4s4s4s", start + len(body), bytes(4), 0x02100000, b"mntr", b"RGB ", b"XYZ "
    )
    head += struct.pack(">6H", 2000, 1, 1, 0, 0, 0) + b"acsp" + bytes(28) + fixed(*white)
    return head.ljust(128, b"\0") + struct.pack(">I", len(tags)) + table + body


# ---- PNG by hand -----------------------------------------------------------------------------

GREY, RGB, GREY_ALPHA, RGB_ALPHA = 0, 2, 4, 6  # colour types of the format
PNG_MAGIC = b"\x89PNG\r\n\x1a\n"


def chunk(kind: bytes, data: bytes) -> bytes:
    check = zlib.crc32(kind + data)
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", check)


def png_file(
    width: int, height: int, pixels: bytes, *, depth: int = 8, color: int = RGB, before: bytes = b""
) -> bytes:
    """`pixels` are compressed already; `before` are chunks in front of them."""
    header = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, depth, color, 0, 0, 0))
    return PNG_MAGIC + header + before + chunk(b"IDAT", pixels) + chunk(b"IEND", b"")


def png(
    array: np.ndarray, *, depth: int = 8, color: int = RGB, before: bytes = b"", level: int = 6
) -> bytes:
    rows = b"".join(b"\0" + row.tobytes() for row in array)
    height, width = array.shape[:2]
    pixels = zlib.compress(rows, level)
    return png_file(width, height, pixels, depth=depth, color=color, before=before)


@cache
def zeros_compressed(size: int) -> bytes:
    """A whole zlib stream of `size` zeros, from one piece that is repeated."""
    piece = 1 << 20
    packer = zlib.compressobj(9, zlib.DEFLATED, -15)
    first = packer.compress(bytes(piece)) + packer.flush(zlib.Z_FULL_FLUSH)
    rest = zlib.compressobj(9, zlib.DEFLATED, -15)
    last = rest.compress(bytes(size % piece)) + rest.flush()
    adler = struct.pack(">I", (size % 65521) << 16 | 1)
    return b"\x78\xda" + first * (size // piece) + last + adler


# ---- pictures to refuse ------------------------------------------------------------------------


def foreign(kind: str) -> Callable[[Draw], Picture]:
    def make(draw: Draw) -> Picture:
        return Picture(draw.pick(".png", ".jpg"), encode(draw.picture(), kind))

    return make


def text_instead(text: str) -> Callable[[Draw], Picture]:
    def make(draw: Draw) -> Picture:
        return Picture(draw.pick(".jpg", ".png"), text.encode())

    return make


HTML = "<!DOCTYPE html>\n<html><body><h1>404 Not Found</h1></body></html>\n"
SVG = '<svg xmlns="http://www.w3.org/2000/svg" width="32" height="32"><rect width="9"/></svg>'


def random_bytes(draw: Draw) -> Picture:
    return Picture(draw.pick(".png", ".jpg"), draw.dice.bytes(2000))


def float_tiff(draw: Draw) -> Picture:
    levels = Image.fromarray(draw.picture()[..., 0].astype(np.float32))
    return Picture(draw.pick(".png", ".jpg"), encode(levels, "TIFF"))


def half_jpeg(draw: Draw) -> Picture:
    data = encode_jpeg(draw.picture(), progressive=draw.turn % 2 == 1)
    start = data.index(b"\xff\xda")
    return Picture(".jpg", data[: (start + len(data)) // 2])


def jpeg_without_end(draw: Draw) -> Picture:
    """Its marker alone would not do: whether Pillow misses that depends on the bits before it."""
    return Picture(".jpg", encode_jpeg(draw.picture())[:-24])


def jpeg_header_only(draw: Draw) -> Picture:
    data = encode_jpeg(draw.picture())
    return Picture(".jpg", data[: data.index(b"\xff\xda")])


def half_webp(draw: Draw) -> Picture:
    data = encode(draw.picture(), "WEBP", lossless=True)
    return Picture(".webp", data[: len(data) // 2])


def noisy_png(draw: Draw, level: int) -> tuple[bytearray, int, int]:
    """A file of noise, and where its pixels begin and end."""
    noise = draw.dice.integers(0, 256, (draw.height, draw.width, 3), dtype=np.uint8)
    data = bytearray(png(noise, level=level))
    return data, data.index(b"IDAT") + 4, len(data) - 16


def flipped_pixel(draw: Draw) -> Picture:
    """Stored without compression, so that only the checksums show it."""
    data, start, end = noisy_png(draw, level=0)
    data[int(draw.dice.integers(start + 16, end - 16))] ^= 1 << draw.turn % 8
    return Picture(".png", bytes(data))


def flipped_bits(draw: Draw) -> Picture:
    data, start, end = noisy_png(draw, level=6)
    for at in draw.dice.integers(start + 16, end - 16, 8):
        data[int(at)] ^= 0x40
    return Picture(".png", bytes(data))


def half_png(draw: Draw) -> Picture:
    data, start, end = noisy_png(draw, level=6)
    return Picture(".png", bytes(data[: (start + end) // 2]))


def zero_tail(draw: Draw) -> Picture:
    data, start, end = noisy_png(draw, level=6)
    middle = (start + end) // 2
    return Picture(".png", bytes(data[:middle]).ljust(len(data), b"\0"))


def pixel_bomb(draw: Draw) -> Picture:
    """432 MB of black in 420 kB; every byte of it is valid."""
    side = 12000
    return Picture(".png", png_file(side, side, zeros_compressed(side * (1 + 3 * side))))


def huge_header(draw: Draw) -> Picture:
    return Picture(".png", png_file(60000, 60000, zeros_compressed(1000)))


def chunk_bomb(kind: bytes, head: bytes) -> Callable[[Draw], Picture]:
    """A good picture in front of which 256 MB of remarks are to be unpacked."""

    def make(draw: Draw) -> Picture:
        bomb = chunk(kind, head + zeros_compressed(256 << 20))
        return Picture(".png", png(draw.picture(), before=bomb))

    return make


def one_pixel(draw: Draw) -> Picture:
    return Picture(".png", encode(np.full((1, 1, 3), draw.turn, np.uint8)))


def one_row(draw: Draw) -> Picture:
    shape = (1, 9000, 3) if draw.turn % 2 else (9000, 1, 3)
    return Picture(".png", encode(np.full(shape, draw.turn, np.uint8)))


ACCEPTED: dict[str, Callable[[Draw], Picture]] = {
    "CMYK JPEG": cmyk_jpeg,
    "grey JPEG": grey_jpeg,
    "grey PNG": grey_png,
    "palette PNG": palette_png,
    "palette PNG with transparency": transparent_palette_png,
    "LA PNG": la_png,
    "RGBA PNG": rgba_png,
    "RGBA WebP": rgba_webp,
    "PNG with a transparent colour": transparent_color_png,
    "1-bit PNG": one_bit_png,
    "16-bit grey PNG": deep_grey_png,
    "16-bit LA PNG": deep_la_png,
    "16-bit RGB PNG": deep_rgb_png,
    "16-bit RGBA PNG": deep_rgba_png,
    "JPEG turned by EXIF": turned_jpeg,  # by each of the seven ways in turn
    "WebP turned by EXIF": turned_webp,
    "PNG turned by EXIF": turned_png,
    "PNG named .jpg": png_named_jpg,
    "JPEG named .png": jpeg_named_png,
    "upper case suffix": upper_case_suffix,
    "animated WebP": animated_webp,
    "animated PNG": animated_png,
    "JPEG with a colour profile": profiled_jpeg,
    "PNG with a colour profile": profiled_png,
    "progressive JPEG": progressive_jpeg,
    "JPEG with junk behind it": jpeg_with_a_tail,
    "lossless WebP": lossless_webp,
    "lossy WebP": lossy_webp,
}

REFUSED: dict[str, tuple[str, Callable[[Draw], Picture]]] = {
    "random bytes": ("foreign", random_bytes),
    "HTML page": ("foreign", text_instead(HTML)),
    "SVG": ("foreign", text_instead(SVG)),
    "EPS": ("foreign", foreign("EPS")),
    "GIF": ("foreign", foreign("GIF")),
    "BMP": ("foreign", foreign("BMP")),
    "TIFF": ("foreign", foreign("TIFF")),
    "float TIFF": ("foreign", float_tiff),
    "half JPEG": ("broken", half_jpeg),
    "JPEG without its end": ("broken", jpeg_without_end),
    "JPEG header only": ("broken", jpeg_header_only),
    "half WebP": ("broken", half_webp),
    "PNG with flipped bits": ("broken", flipped_bits),
    "PNG with one flipped bit in a pixel": ("broken", flipped_pixel),
    "half PNG": ("broken", half_png),
    "PNG with a tail of zeros": ("broken", zero_tail),
    "zTXt bomb": ("broken", chunk_bomb(b"zTXt", b"Comment\0\0")),
    "iTXt bomb": ("broken", chunk_bomb(b"iTXt", b"Comment\0\1\0\0\0")),
    "iCCP bomb": ("broken", chunk_bomb(b"iCCP", b"profile\0\0")),
    "12000 x 12000 PNG": ("huge", pixel_bomb),
    "60000 x 60000 header": ("huge", huge_header),
    "1 x 1": ("tiny", one_pixel),
    "1 x 9000": ("tiny", one_row),
}
IN_PREPARE = {"1 x 1": REASONS["too small"], "1 x 9000": REASONS["too elongated"]}


def plain_picture(draw: Draw) -> Picture:
    rgb = draw.picture()
    return Picture(".png", encode(rgb), rgb)


# ---- samples ---------------------------------------------------------------------------------


@dataclass(frozen=True)
class Member:
    """A member of a tar; `prefix` stands before the key in its name."""

    suffix: str
    data: bytes = b""
    kind: bytes = tarfile.REGTYPE
    link: str = ""
    prefix: str = ""


@dataclass(frozen=True)
class Shapes:
    """What the samples carry beside image and caption."""

    height: int
    width: int
    latent: Shape | None
    text: Mapping[str, Shape] | None


@dataclass
class Parts:
    """A sound sample, for a kind to spoil."""

    draw: Draw
    shapes: Shapes
    picture: Picture
    members: dict[str, bytes]  # by suffix

    def all(self) -> list[Member]:
        return [Member(name, data) for name, data in self.members.items()]

    def without(self, suffix: str) -> list[Member]:
        return [member for member in self.all() if member.suffix != suffix]

    def with_data(self, suffix: str, data: bytes) -> list[Member]:
        return [Member(name, part) for name, part in (self.members | {suffix: data}).items()]

    def with_latent(self, latent: np.ndarray, name: str = "latent") -> list[Member]:
        return self.with_data(LATENT, to_safetensors({name: latent}))

    def latent(self, *grow: int) -> np.ndarray:
        """Noise in the latent's shape, so much larger in each dimension."""
        assert self.shapes.latent is not None
        shape = tuple(map(sum, zip(self.shapes.latent, grow or (0, 0, 0), strict=True)))
        return self.draw.dice.standard_normal(shape, dtype=np.float32)

    def text(self, wider: int = 0) -> dict[str, np.ndarray]:
        assert self.shapes.text is not None
        return draw_text(self.draw, self.shapes.text, wider)


def draw_text(draw: Draw, shapes: Mapping[str, Shape], wider: int = 0) -> dict[str, np.ndarray]:
    return {
        name: draw.dice.standard_normal((*shape[:-1], shape[-1] + wider), dtype=np.float32)
        for name, shape in shapes.items()
    }


def sound(draw: Draw, shapes: Shapes, picture: Picture, caption: str, *, facts: bool) -> Parts:
    members = {picture.suffix: picture.data, CAPTION: caption.encode()}
    if facts:
        height, width = shapes.height, shapes.width
        members[FACTS] = json.dumps({"width": width, "height": height, "source": "test"}).encode()
    if shapes.latent is not None:
        latent = draw.dice.standard_normal(shapes.latent, dtype=np.float32)
        members[LATENT] = to_safetensors({"latent": latent})
    if shapes.text is not None:
        members[TEXT] = to_safetensors(draw_text(draw, shapes.text))
    return Parts(draw, shapes, picture, members)


Spoil = Callable[[Parts], list[Member]]


def in_folder(*prefixes: str) -> Spoil:
    def spoil(parts: Parts) -> list[Member]:
        prefix = parts.draw.pick(*prefixes)
        return [Member(name, data, prefix=prefix) for name, data in parts.members.items()]

    return spoil


def not_plain(kind: bytes, link: str = "") -> Spoil:
    def spoil(parts: Parts) -> list[Member]:
        suffix = parts.picture.suffix
        return [*parts.without(suffix), Member(suffix, kind=kind, link=link)]

    return spoil


def emptied(suffix: str) -> Spoil:
    return lambda parts: parts.with_data(suffix or parts.picture.suffix, b"")


def replaced(suffix: str, *contents: bytes) -> Spoil:
    def spoil(parts: Parts) -> list[Member]:
        return parts.with_data(suffix, contents[parts.draw.turn % len(contents)])

    return spoil


def suffix_twice(parts: Parts) -> list[Member]:
    again = plain_picture(parts.draw)
    if parts.draw.turn % 2:
        return [*parts.all(), Member(CAPTION, b"another caption")]
    return [*parts.all(), Member(".png", again.data)]


def two_images(parts: Parts) -> list[Member]:
    return [*parts.all(), Member(".jpg", encode_jpeg(parts.draw.picture()))]


def wrong_size(parts: Parts) -> list[Member]:
    height, width = parts.shapes.height, parts.shapes.width
    sizes = [(width + 16, height), (width, height + 16), (width // 2, height // 2)]
    width, height = sizes[parts.draw.turn % len(sizes)]
    return parts.with_data(FACTS, json.dumps({"width": width, "height": height}).encode())


def not_finite(value: float) -> Spoil:
    def spoil(parts: Parts) -> list[Member]:
        latent = parts.latent()
        latent.flat[int(parts.draw.dice.integers(latent.size))] = value
        return parts.with_latent(latent)

    return spoil


def text_with_nan(parts: Parts) -> list[Member]:
    text = parts.text()
    next(iter(text.values())).flat[-1] = np.nan
    return parts.with_data(TEXT, to_safetensors(text))


NOT_UTF8 = "na\u00efve".encode("latin-1")
PICKLE, ZIP = b"\x80\x04K*.", b"PK\3\4"
LONG = struct.pack("<Q", 1 << 62) + b'{"latent":'  # a header that says it has 2^62 bytes

IN_FOLDERS_TOO: dict[str, tuple[str, Spoil]] = {
    "caption not UTF-8": (
        "caption",
        replaced(CAPTION, NOT_UTF8, b"\xff\xfe" + "cat".encode("utf-16-le")),
    ),
}
IN_SHARDS: dict[str, tuple[str, Spoil]] = {
    "empty image": ("empty", emptied("")),
    "key with a folder": ("path", in_folder("folder/", "a/b/")),
    "key that leads outside": ("path", in_folder("../", "../../../tmp/")),
    "absolute key": ("path", in_folder("/etc/", "/tmp/")),
    "symlink": ("link", not_plain(tarfile.SYMTYPE, "/etc/hostname")),
    "hard link": ("link", not_plain(tarfile.LNKTYPE, "000000.png")),
    "device": ("link", not_plain(tarfile.CHRTYPE)),
    "pipe": ("link", not_plain(tarfile.FIFOTYPE)),
    "duplicate suffix": ("suffix twice", suffix_twice),
    "same key twice in a shard": ("key twice", lambda parts: parts.all()),
    "same key in two shards": ("key twice", lambda parts: parts.all()),
    "two images": ("two images", two_images),
    "no image": ("no image", lambda parts: parts.without(parts.picture.suffix)),
    "facts not JSON": ("facts", replaced(FACTS, b'{"width": 32,', b"[32, 48]", b"\xff\xfe\0")),
    "wrong size in the facts": ("facts size", wrong_size),
}
WITH_LATENT: dict[str, tuple[str, Spoil]] = {
    "empty latent": ("empty", emptied(LATENT)),
    "latent not safetensors": ("latent file", replaced(LATENT, PICKLE, LONG, ZIP)),
    "no tensor called latent": ("latent shape", lambda p: p.with_latent(p.latent(), "z")),
    "latent of another rank": ("latent shape", lambda p: p.with_latent(p.latent()[None])),
    "latent too wide": ("latent shape", lambda p: p.with_latent(p.latent(0, 0, 2))),
    "latent too low": ("latent shape", lambda p: p.with_latent(p.latent(0, -2, 0))),
    "latent of too many channels": ("latent channels", lambda p: p.with_latent(p.latent(1, 0, 0))),
    "integer latent": ("latent dtype", lambda p: p.with_latent(p.latent().astype(np.int32))),
    "latent with NaN": ("latent values", not_finite(np.nan)),
    "latent with infinity": ("latent values", not_finite(-np.inf)),
}
WITH_TEXT: dict[str, tuple[str, Spoil]] = {
    "text not safetensors": ("text file", replaced(TEXT, PICKLE, LONG)),
    "text with NaN": ("text values", text_with_nan),
    "text too wide": ("text width", lambda p: p.with_data(TEXT, to_safetensors(p.text(wider=1)))),
    "no text": ("no text", lambda p: p.without(TEXT)),
}

# Captions that are fine: what is stored (None: no file), and what must be read.
CAPTIONS: dict[str, tuple[bytes | None, str]] = {
    "no caption": (None, ""),
    "empty caption": (b"", ""),
    "caption of 1 MB": (b"many words " * 95_000 + b"end", "many words " * 95_000 + "end"),
    "caption with a BOM": (b"\xef\xbb\xbfa cat, na\xc3\xafve", "a cat, na\u00efve"),
}

FOLDER_KINDS = (*ACCEPTED, *CAPTIONS, *REFUSED, *IN_FOLDERS_TOO)
KINDS = (*FOLDER_KINDS, *IN_SHARDS, *WITH_LATENT, *WITH_TEXT)


@dataclass(frozen=True)
class Entry:
    """A sample before it has a key."""

    kind: str  # "" where it is plain
    turn: int
    parts: Parts
    members: list[Member]
    reason: str = ""
    caption: str = ""


def make_entry(kind: str, turn: int, number: int, seed: int, shapes: Shapes) -> Entry:
    draw = Draw(shapes.height, shapes.width, np.random.default_rng([seed, number]), turn)
    caption = f"picture {number}, drawn with {seed}"
    maker, spoil, reason = plain_picture, None, ""
    facts = bool(draw.dice.integers(2))  # where they are missing, the picture's header says it
    if kind in ACCEPTED:
        maker = ACCEPTED[kind]
    elif kind in REFUSED:
        reason, maker = REFUSED[kind]
    elif kind and kind not in CAPTIONS:
        reason, spoil = (IN_FOLDERS_TOO | IN_SHARDS | WITH_LATENT | WITH_TEXT)[kind]
    facts = facts and reason != "tiny"  # theirs would be wrong
    parts = sound(draw, shapes, maker(draw), caption, facts=facts)
    members = spoil(parts) if spoil else parts.all()
    if kind in CAPTIONS:
        stored, caption = CAPTIONS[kind]
        members = parts.without(CAPTION) if stored is None else parts.with_data(CAPTION, stored)
    return Entry(kind, turn, parts, members, REASONS.get(reason, ""), caption)


def case_of(entry: Entry, key: str, shard: str) -> Case:
    reason_in_prepare = IN_PREPARE.get(entry.kind, entry.reason)
    if entry.reason:
        return Case(entry.kind, "refuse", entry.reason, reason_in_prepare, key, shard)
    picture = entry.parts.picture
    seen = (picture.expected, picture.tolerance, entry.caption)
    return Case(entry.kind, "accept", "", "", key, shard, *seen)


def plain_of(entry: Entry, shard: str) -> Plain:
    assert entry.parts.picture.expected is not None
    return Plain(shard, entry.parts.picture.expected, entry.caption)


def draw_entries(
    kinds: Sequence[str], difficult: int, plain: int, seed: int, shapes: Shapes
) -> list[Entry]:
    """All of them in a random order, the kinds in turn, a plain one first."""
    chosen = [("", 0)] * plain + [
        (kinds[i % len(kinds)], i // len(kinds)) for i in range(difficult)
    ]
    order = 1 + np.random.default_rng(seed).permutation(len(chosen) - 1)
    return [make_entry(*chosen[at], int(at), seed, shapes) for at in (0, *order)]


# ---- shards ------------------------------------------------------------------------------------

Group = tuple[str, list[Member]]  # a key and the members that follow each other under it


def write_tar(path: Path, groups: list[Group]) -> dict[str, list[int]]:
    """Returns where each member of each key begins, and where the last one ends."""
    starts: dict[str, list[int]] = {}
    with (
        path.open("wb") as file,
        tarfile.open(fileobj=file, mode="w", format=tarfile.USTAR_FORMAT) as tar,
    ):
        for key, members in groups:
            marks = starts.setdefault(key, [])
            for member in members:
                info = tarfile.TarInfo(f"{member.prefix}{key}{member.suffix}")
                info.size, info.type, info.linkname = len(member.data), member.kind, member.link
                marks.append(tar.offset)
                tar.addfile(info, io.BytesIO(member.data))
            marks.append(tar.offset)
    return starts


def make_shards(
    folder: Path,
    *,
    difficult: int = len(KINDS),
    plain: int = 200,
    per_shard: int = 100,
    size: tuple[int, int] = (32, 48),
    latent: Shape | None = (4, 8, 12),
    text: Mapping[str, Shape] | None = None,
    damages: bool = True,
    seed: int = 0,
) -> Corpus:
    """Difficult and plain samples in a random order; then one shard for each kind of damage.

    Every accepted picture has the given (height, width), which the latent must fit; a refused
    latent is at most two cells lower. Without latent or text their kinds are left out. With at
    least as many difficult ones as there are kinds, each kind is there.
    """
    assert plain > 0, "the first sample is plain, so that a later shard can repeat its key"
    assert min(size) >= 32, "smaller pictures lose more in a JPEG"
    shapes = Shapes(*size, latent, text)
    kinds = [*FOLDER_KINDS, *IN_SHARDS]
    kinds += [] if latent is None else WITH_LATENT
    kinds += [] if text is None else WITH_TEXT
    entries = draw_entries(kinds, difficult, plain, seed, shapes)
    count = max(2, -(-len(entries) // per_shard))
    cuts = [round(len(entries) * i / count) for i in range(count + 1)]
    across = "same key in two shards"
    swap_out_of_first_shard(entries, cuts[1], across)

    folder.mkdir(parents=True, exist_ok=True)
    corpus = Corpus([folder / f"{number:06d}.tar" for number in range(count)], [], {})
    known: dict[str, Plain] = {}
    for path, (start, end) in zip(corpus.paths, pairwise(cuts), strict=True):
        groups, behind = list[Group](), list[Group]()
        earlier = list(known)
        for number, entry in enumerate(entries[start:end], start):
            key = f"{number:06d}"
            if not entry.kind:
                known[key] = plain_of(entry, path.name)
            else:
                key = earlier[entry.turn % len(earlier)] if entry.kind == across else key
                corpus.cases.append(case_of(entry, key, path.name))
            groups.append((key, entry.members))
            if entry.kind == "same key twice in a shard":
                behind.append((key, other_half(entry)))
        if behind and groups[-1][0] == behind[0][0]:
            groups.insert(0, groups.pop())  # not next to its second half
        write_tar(path, groups + behind)
    damaged = make_damages(folder, count, len(entries), seed, shapes) if damages else []
    paths = [*corpus.paths, *(folder / damage.shard for damage in damaged)]
    return Corpus(paths, corpus.cases, known, damaged)


def other_half(entry: Entry) -> list[Member]:
    """The same suffixes with another picture in them."""
    draw = entry.parts.draw
    other = sound(draw, entry.parts.shapes, plain_picture(draw), "another caption", facts=True)
    return other.all()


def swap_out_of_first_shard(entries: list[Entry], end: int, kind: str) -> None:
    places = [at for at in range(end, len(entries)) if entries[at].kind != kind]
    for at in range(end):
        if entries[at].kind == kind:
            there = places.pop()
            entries[at], entries[there] = entries[there], entries[at]


# ---- damaged shards ----------------------------------------------------------------------------

DAMAGED_SAMPLES = 10
FIRST_BROKEN = 4

DAMAGES = {
    "truncated in the data of a member": "cut off",
    "truncated in a header": "cut off",
    "truncated at the end of a sample": "cut off",
    "truncated between image and caption": "cut off",
    "header with a bad checksum": "damaged",
    "block of zeros over a header": "damaged",
    "hole of zeros": "damaged",
    "random bytes over several samples": "damaged",
    "random bytes inside an image": "broken",
    "empty file": "no tar",
    "file of random bytes": "no tar",
    "HTML error page": "no tar",
    "no file": "missing",
}


def make_damages(
    folder: Path, first_shard: int, first_key: int, seed: int, shapes: Shapes
) -> list[Damage]:
    damages = []
    for number, (kind, reason) in enumerate(DAMAGES.items()):
        path = folder / f"{first_shard + number:06d}.tar"
        base = first_key + number * DAMAGED_SAMPLES
        keys = [f"{base + i:06d}" for i in range(DAMAGED_SAMPLES)]
        entries = [make_entry("", 0, base + i, seed, shapes) for i in range(DAMAGED_SAMPLES)]
        groups = [(key, entry.members) for key, entry in zip(keys, entries, strict=True)]
        starts = list(write_tar(path, groups).values())
        dice = np.random.default_rng([seed, base])
        lost, either = break_shard(path, kind, starts, dice)
        plain = {key: plain_of(e, path.name) for key, e in zip(keys, entries, strict=True)}
        whole = [key for i, key in enumerate(keys) if i not in lost and i not in either]
        damages.append(
            Damage(
                path.name,
                kind,
                REASONS[reason],
                {key: plain[key] for key in whole},
                frozenset(keys[i] for i in lost),
                frozenset(keys[i] for i in either),
            )
        )
    return damages


def break_shard(
    path: Path, kind: str, starts: list[list[int]], dice: np.random.Generator
) -> tuple[range, range]:
    """Which samples are lost, and which are whole without a reader being able to know it.

    `starts` are the offsets of the headers of each sample, and its end; the image comes first.
    The damage begins and ends inside of a sample, so that no whole one lies next to it.
    """
    data, i = bytearray(path.read_bytes()), FIRST_BROKEN
    image, caption = starts[i][:2]
    pixels = (image + BLOCK + caption) // 2 - 16  # inside IDAT
    far = starts[i + 2][0] + BLOCK + 40  # in the image after next
    here, rest, nothing = range(i, i + 1), range(i, DAMAGED_SAMPLES), range(0)
    everything = range(DAMAGED_SAMPLES)
    if kind == "no file":
        path.unlink()
        return everything, nothing
    whole = {
        "empty file": b"",
        "file of random bytes": dice.bytes(20_000),
        "HTML error page": HTML.encode(),
    }
    ends = {
        "truncated in the data of a member": pixels,
        "truncated in a header": caption + 200,
        "truncated at the end of a sample": image,
        "truncated between image and caption": caption,
    }
    if kind in whole:
        path.write_bytes(whole[kind])
        return everything, nothing
    if kind in ends:
        path.write_bytes(data[: ends[kind]])
        return rest, range(i - 1, i) if ends[kind] == image else nothing
    if kind == "header with a bad checksum":
        data[caption + 150] ^= 1  # a digit of it
    elif kind == "block of zeros over a header":
        data[caption : caption + BLOCK] = bytes(BLOCK)
    elif kind == "random bytes inside an image":
        data[pixels : pixels + 24] = dice.bytes(24)
    else:
        hole = kind == "hole of zeros"
        data[caption + 100 : far] = (
            bytes(far - caption - 100) if hole else dice.bytes(far - caption - 100)
        )
        here = range(i, i + 3)
    path.write_bytes(data)
    return here, nothing


# ---- folders -----------------------------------------------------------------------------------


def make_folder(
    folder: Path,
    *,
    difficult: int = len(FOLDER_KINDS),
    plain: int = 200,
    size: tuple[int, int] = (32, 48),
    seed: int = 0,
) -> Corpus:
    """Loose image files, each with its caption beside it: KEY.png and KEY.txt."""
    shapes = Shapes(*size, None, None)
    corpus = Corpus([], [], known := {})
    folder.mkdir(parents=True, exist_ok=True)
    for number, entry in enumerate(draw_entries(FOLDER_KINDS, difficult, plain, seed, shapes)):
        key = f"{number:06d}"
        for member in entry.members:
            if member.suffix != FACTS:
                corpus.paths.append(folder / f"{key}{member.suffix}")
                corpus.paths[-1].write_bytes(member.data)
        if entry.kind:
            corpus.cases.append(case_of(entry, key, ""))
        else:
            known[key] = plain_of(entry, "")
    return corpus
