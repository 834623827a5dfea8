"""Image files come out as people see them, whatever mode, profile or rotation they carry."""

import struct
import zlib
from functools import cache
from io import BytesIO

import numpy as np
import pytest
import torch
from PIL import Image, ImageCms

from asymlift.data.pictures import (
    BadPicture,
    decode_image,
    encode_png,
    float_to_image,
    image_size,
    image_to_float,
    resize_image,
)

GRADIENT = np.linspace(0, 255, 48 * 32).reshape(32, 48).astype(np.uint8)
RGB = np.stack([GRADIENT, GRADIENT[::-1], GRADIENT[:, ::-1]], -1)


def saved(picture: Image.Image, kind: str = "PNG", **options) -> bytes:
    stream = BytesIO()
    picture.save(stream, format=kind, **options)
    return stream.getvalue()


def expected(array: np.ndarray) -> torch.Tensor:
    return torch.from_numpy(array.copy()).permute(2, 0, 1)


def close(image: torch.Tensor, array: np.ndarray, levels: float) -> bool:
    return bool((image.float() - expected(array).float()).abs().mean() <= levels)


def png_claiming(width: int, height: int) -> bytes:
    """A PNG header for an image that is not there."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return (
            struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))
        )

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    body = chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(bytes(64))) + chunk(b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + body


@pytest.mark.parametrize("kind, options", [("PNG", {}), ("WEBP", {"lossless": True})])
def test_lossless_files_come_back_exactly(kind, options):
    assert torch.equal(decode_image(saved(Image.fromarray(RGB), kind, **options)), expected(RGB))


def test_a_png_survives_encode_and_decode_and_always_has_the_same_bytes():
    image = expected(RGB)
    assert torch.equal(decode_image(encode_png(image)), image)
    assert encode_png(image) == encode_png(image.clone())


def test_uint8_survives_the_trip_through_floats():
    levels = torch.arange(256, dtype=torch.uint8).expand(3, 1, 256)
    assert torch.equal(float_to_image(image_to_float(levels)), levels)


@pytest.mark.parametrize("mode", ["L", "1", "P", "LA", "CMYK"])
def test_other_modes_become_rgb(mode):
    picture = Image.fromarray(RGB).convert(mode)
    kind = "JPEG" if mode == "CMYK" else "PNG"
    image = decode_image(saved(picture, kind))
    assert close(image, np.asarray(picture.convert("RGB")), 4 if mode == "CMYK" else 0)


def test_sixteen_bit_grey_is_scaled_not_clipped():
    deep = np.linspace(0, 65535, 48 * 32).reshape(32, 48).astype(np.uint16)
    image = decode_image(saved(Image.fromarray(deep)))
    assert torch.equal(image[0], torch.from_numpy((deep / 257).round().astype(np.uint8)))
    assert torch.equal(image[0], image[2])


@pytest.mark.parametrize("mode", ["RGBA", "LA", "P", "RGB"])
def test_what_is_transparent_is_white_even_with_a_colour_underneath(mode):
    picture = Image.new("RGBA", (8, 8), (255, 0, 0, 0)).convert(mode)
    options = {"P": {"transparency": 0}, "RGB": {"transparency": (255, 0, 0)}}.get(mode, {})
    if mode == "P":
        picture = Image.new("P", (8, 8), 0)
    assert decode_image(saved(picture, **options)).min() == 255


def test_half_transparent_black_is_grey():
    picture = Image.new("RGBA", (8, 8), (0, 0, 0, 128))
    assert decode_image(saved(picture)).unique().tolist() == [127]


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_turns_the_picture_upright(kind, orientation):
    turns = {1: RGB, 2: RGB[:, ::-1], 3: RGB[::-1, ::-1], 4: RGB[::-1], 5: RGB.transpose(1, 0, 2)}
    turns |= {6: np.rot90(RGB, -1), 7: np.rot90(RGB, 2).transpose(1, 0, 2), 8: np.rot90(RGB)}
    exif = Image.Exif()
    exif[0x0112] = orientation
    options = {"quality": 95, "subsampling": 0} if kind == "JPEG" else {}
    options |= {"lossless": True} if kind == "WEBP" else {}

    data = saved(Image.fromarray(RGB), kind, exif=exif, **options)

    image = decode_image(data)
    assert close(image, turns[orientation], 3 if kind == "JPEG" else 0)
    assert image_size(data) == (image.shape[2], image.shape[1])


def test_a_sixteen_bit_picture_is_turned_too():
    exif = Image.Exif()
    exif[0x0112] = 6
    data = saved(Image.fromarray(np.zeros((4, 9), np.uint16)), exif=exif)
    assert decode_image(data).shape == (3, 9, 4)


def test_a_profile_is_applied_and_a_broken_one_ignored():
    lab = ImageCms.ImageCmsProfile(ImageCms.createProfile("LAB"))
    picture = Image.fromarray(RGB)
    plain = decode_image(saved(picture))

    for ignored in (b"not a profile", lab.tobytes()):  # broken; of another colour space
        assert torch.equal(decode_image(saved(picture, icc_profile=ignored)), plain)

    srgb = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    assert torch.equal(decode_image(saved(picture, icc_profile=srgb)), plain)

    swapped = swap_primaries(srgb)
    image = decode_image(saved(picture, icc_profile=swapped))
    assert (image.float() - plain[[2, 1, 0]].float()).abs().max() <= 2


def swap_primaries(profile: bytes) -> bytes:
    """sRGB with red and blue exchanged, under another name."""
    data = profile.replace(b"rXYZ", b"tmp!").replace(b"bXYZ", b"rXYZ").replace(b"tmp!", b"bXYZ")
    return data.replace("sRGB".encode("utf-16-be"), "test".encode("utf-16-be"))


def test_an_animation_gives_its_first_frame():
    frames = [Image.fromarray(RGB), Image.fromarray(255 - RGB)]
    data = saved(frames[0], "WEBP", save_all=True, append_images=frames[1:], lossless=True)
    assert torch.equal(decode_image(data), expected(RGB))


@pytest.mark.parametrize("side", [12_000, 60_000])
def test_a_bomb_is_refused_before_it_is_decoded(side):
    for use in (decode_image, image_size):
        with pytest.raises(BadPicture, match="too many pixels"):
            use(png_claiming(side, side))


@cache
def bad_files() -> dict[str, bytes]:
    jpeg = saved(Image.fromarray(RGB), "JPEG")
    eps = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 10 10\n"
    return {
        "empty": b"",
        "html": b"<html><body>404 not found</body></html>",
        "eps": eps,
        "svg": b"<svg xmlns='http://www.w3.org/2000/svg'/>",
        "gif": saved(Image.fromarray(GRADIENT), "GIF"),
        "tiff": saved(Image.fromarray(GRADIENT.astype(np.float32)), "TIFF"),
        "half": jpeg[: len(jpeg) // 2],
        "header only": jpeg[:20],
        "text bomb": png_with_text(100 * 2**20),
        "short data": png_claiming(64, 64),
    }


def png_with_text(size: int) -> bytes:
    data = saved(Image.fromarray(RGB))
    packed = b"Comment\0\0" + zlib.compress(bytes(size))
    chunk = b"zTXt" + packed
    cut = 33  # behind the header
    whole = struct.pack(">I", len(packed)) + chunk + struct.pack(">I", zlib.crc32(chunk))
    return data[:cut] + whole + data[cut:]


BAD = ["empty", "html", "eps", "svg", "gif", "tiff", "half", "header only"]
BAD += ["text bomb", "short data"]


@pytest.mark.parametrize("name", BAD)
def test_a_file_that_is_no_usable_image_is_named_not_a_crash(name):
    with pytest.raises(BadPicture, match=r"not a JPEG|cannot be decoded"):
        decode_image(bad_files()[name])


def test_flipped_bytes_give_a_picture_or_a_reason():
    """600 damaged files: the decoders may raise anything, callers only ever see BadPicture."""
    draw = np.random.default_rng(0)
    for kind in ("PNG", "JPEG", "WEBP"):
        whole = saved(Image.fromarray(RGB), kind)
        for _ in range(200):
            data = bytearray(whole)
            for place in draw.integers(0, len(data), 3):
                data[place] ^= 1 << draw.integers(0, 8)
            try:
                assert decode_image(bytes(data)).dtype == torch.uint8
            except BadPicture as error:
                assert error.reason in str(error)


def test_resizing_to_the_same_size_changes_nothing():
    image = expected(RGB)
    assert resize_image(image, 32, 48) is image
    assert resize_image(image, 16, 24).shape == (3, 16, 24)
