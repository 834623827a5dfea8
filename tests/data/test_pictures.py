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
    encode_picture,
    encode_png,
    float_to_image,
    image_size,
    image_to_float,
    picture_suffix,
    reads_plainly,
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


def chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def png_of(width: int, height: int, depth: int, color: int, rows: bytes, *more: bytes) -> bytes:
    """A PNG of any kind, put together by hand; `more` are chunks in front of the pixels."""
    header = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, depth, color, 0, 0, 0))
    body = header + b"".join(more) + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + body


def png_claiming(width: int, height: int) -> bytes:
    """A PNG header for an image that is not there."""
    return png_of(width, height, 8, 2, bytes(64))


def jpeg_claiming(width: int, height: int) -> bytes:
    data = saved(Image.fromarray(RGB), "JPEG")
    place = data.index(b"\xff\xc0") + 5
    return data[:place] + struct.pack(">HH", height, width) + data[place + 4 :]


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


@pytest.mark.parametrize("color, num", [(2, 3), (6, 4)])  # without and with an opaque alpha
def test_sixteen_bit_colour_is_scaled_not_clipped(color, num):
    deep = np.full((32, 48, 4), 65535, ">u2")
    deep[..., :3] = np.linspace(0, 65535, 32 * 48 * 3).reshape(32, 48, 3)
    rows = b"".join(b"\0" + row.tobytes() for row in deep[..., :num])

    image = decode_image(png_of(48, 32, 16, color, rows))

    exact = expected(deep[..., :3].astype(np.float32)) / 257
    assert (image - exact).abs().max() < 1
    assert image.min() == 0 and image.max() == 255


def test_the_transparent_level_of_sixteen_bit_grey_is_white():
    rows = b"\0" + struct.pack(">HHH", 999, 1000, 1001)
    clear = chunk(b"tRNS", struct.pack(">H", 1000))
    assert decode_image(png_of(3, 1, 16, 0, rows, clear))[0].tolist() == [[4, 255, 4]]


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


@pytest.mark.parametrize("deep", [False, True])
def test_a_grey_profile_is_applied_at_either_depth(deep):
    levels = np.array([[0, 55, 128, 255]], np.uint8)
    picture = Image.fromarray(levels.astype(np.uint16) * 257 if deep else levels)
    image = decode_image(saved(picture, icc_profile=grey_profile(gamma=1)))
    assert (image[:, 0] - torch.tensor([0.0, 128, 188, 255])).abs().max() <= 1  # sRGB of x / 255
    assert image.shape == (3, 1, 4)


def grey_profile(gamma: float) -> bytes:
    """The smallest profile of a grey scanner, by the ICC specification."""
    white = b"XYZ \0\0\0\0" + struct.pack(">III", 0xF6D6, 0x10000, 0xD32D)
    curve = b"curv\0\0\0\0" + struct.pack(">IHxx", 1, int(gamma * 256))
    table = struct.pack(">I4sII4sII", 2, b"wtpt", 156, len(white), b"kTRC", 176, len(curve))
    head = struct.pack(">I4xI4s4s4s12x4s", 192, 0x02100000, b"mntr", b"GRAY", b"XYZ ", b"acsp")
    head += bytes(28) + struct.pack(">III", 0xF6D6, 0x10000, 0xD32D)
    return head.ljust(128, b"\0") + table + white + curve


def animated(kind: str) -> bytes:
    frames = [Image.fromarray(RGB), Image.fromarray(255 - RGB)]
    options = {"lossless": True} if kind == "WEBP" else {}
    return saved(frames[0], kind, save_all=True, append_images=frames[1:], **options)


@pytest.mark.parametrize("kind", ["WEBP", "PNG"])
def test_an_animation_gives_its_first_frame(kind):
    assert torch.equal(decode_image(animated(kind)), expected(RGB))


def test_a_jpeg_of_two_pictures_gives_the_first():
    """Telephones put a second one, the brightness of the scene, behind the photograph."""
    assert close(decode_image(animated("MPO")), RGB, 4)


@pytest.mark.parametrize("side", [12_000, 60_000])
@pytest.mark.parametrize("claiming", [png_claiming, jpeg_claiming])
def test_a_bomb_is_refused_before_it_is_decoded(side, claiming):
    for use in (decode_image, image_size):
        with pytest.raises(BadPicture) as refused:
            use(claiming(side, side))
        assert refused.value.reason == "too many pixels"


@cache
def bad_files() -> dict[str, bytes]:
    jpeg = saved(Image.fromarray(RGB), "JPEG")
    webp = saved(Image.fromarray(RGB), "WEBP")
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
        "half webp": webp[: len(webp) // 2],
        "zeros": bytes(1000),
    }


def png_with_text(size: int) -> bytes:
    data = saved(Image.fromarray(RGB))
    cut = 33  # behind the header
    text = chunk(b"zTXt", b"Comment\0\0" + zlib.compress(bytes(size)))
    return data[:cut] + text + data[cut:]


FOREIGN = ["empty", "html", "eps", "svg", "gif", "tiff", "zeros", "header only"]
BROKEN = ["half", "text bomb", "short data", "half webp"]


@pytest.mark.parametrize("name", FOREIGN + BROKEN)
def test_a_file_that_is_no_usable_image_is_named_not_a_crash(name):
    with pytest.raises(BadPicture) as refused:
        decode_image(bad_files()[name])
    foreign = name in FOREIGN
    reason = "not a JPEG, PNG or WebP image" if foreign else "image cannot be decoded"
    assert refused.value.reason == reason


@pytest.mark.parametrize("lost", [1, 2])
def test_a_jpeg_without_its_end_mark_is_whole_or_refused(lost):
    for side in (32, 400):
        whole = saved(Image.fromarray(RGB).resize((side, side)), "JPEG")
        try:
            assert torch.equal(decode_image(whole[:-lost]), decode_image(whole))
        except BadPicture as error:
            assert error.reason == "image cannot be decoded"


def test_random_bytes_are_no_image():
    draw = np.random.default_rng(0)
    for _ in range(200):
        with pytest.raises(BadPicture, match="not a JPEG"):
            decode_image(draw.bytes(500))


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


@pytest.mark.parametrize("kind", ["png", "jpeg", "webp"])
def test_a_picture_survives_every_kind_of_file_with_the_same_bytes_each_time(kind):
    image = expected(RGB)
    data = encode_picture(image, kind)
    assert close(decode_image(data), RGB, {"png": 0, "jpeg": 2, "webp": 4}[kind])
    assert encode_picture(image.clone(), kind) == data
    assert picture_suffix(data) == {"png": ".png", "jpeg": ".jpg", "webp": ".webp"}[kind]
    if kind != "png":
        assert len(encode_picture(image, kind, quality=50)) < len(data)


def test_a_jpeg_keeps_colour_at_full_resolution():
    stripes = torch.zeros(3, 32, 32, dtype=torch.uint8)
    stripes[0, :, ::2] = 200
    stripes[2, :, 1::2] = 200
    image = decode_image(encode_picture(stripes, "jpeg"))
    assert (image.float() - stripes.float()).abs().max() < 20


@pytest.mark.parametrize("quality", [50, 95, 100])
def test_noise_fits_into_a_jpeg_too(quality):
    """Pillow's own `optimize` fails on it: "broken data stream when writing image file"."""
    draw = torch.Generator().manual_seed(0)
    image = torch.randint(0, 256, (3, 512, 512), dtype=torch.uint8, generator=draw)
    assert decode_image(encode_picture(image, "jpeg", quality=quality)).shape == image.shape


@pytest.mark.parametrize("name", [name for name in FOREIGN if name != "header only"])
def test_what_is_no_image_has_no_suffix(name):
    with pytest.raises(BadPicture, match="not a JPEG, PNG or WebP image"):
        picture_suffix(bad_files()[name])


def turned() -> Image.Exif:
    exif = Image.Exif()
    exif[0x0112] = 6
    return exif


PLAIN = {
    "png": saved(Image.fromarray(RGB)),
    "jpeg": saved(Image.fromarray(RGB), "JPEG"),
    "webp": saved(Image.fromarray(RGB), "WEBP"),
    "grey": saved(Image.fromarray(GRADIENT), "JPEG"),
    "palette": saved(Image.fromarray(RGB).convert("P")),
    "cmyk": saved(Image.fromarray(RGB).convert("CMYK"), "JPEG"),
    "opaque": saved(Image.fromarray(RGB).convert("RGBA")),
}
PECULIAR = {
    "turned": saved(Image.fromarray(RGB), exif=turned()),
    "clear": saved(Image.new("RGBA", (8, 8), (9, 9, 9, 0))),
    "deep": saved(Image.fromarray(GRADIENT.astype(np.uint16) * 257)),
    "profile": saved(Image.fromarray(GRADIENT), icc_profile=grey_profile(gamma=1)),
    "animated webp": animated("WEBP"),
    "animated png": animated("PNG"),
}


@pytest.mark.parametrize("name", [*PLAIN, *PECULIAR])
def test_a_file_reads_plainly_when_nothing_has_to_be_known_about_it(name):
    data = (PLAIN | PECULIAR)[name]
    assert reads_plainly(data, decode_image(data)) == (name in PLAIN)


def test_a_file_reads_plainly_only_as_the_picture_it_holds():
    image = decode_image(PLAIN["png"])
    other = image.clone()
    other[0, 0, 0] ^= 1
    assert not reads_plainly(PLAIN["png"], other)
    assert not reads_plainly(PLAIN["png"], resize_image(image, 16, 24))
    with pytest.raises(BadPicture, match="not a JPEG"):
        reads_plainly(b"", image)


def test_resizing_to_the_same_size_changes_nothing():
    image = expected(RGB)
    assert resize_image(image, 32, 48) is image
    assert resize_image(image, 16, 24).shape == (3, 16, 24)


def png_with_exif_behind_the_pixels() -> bytes:
    exif = Image.Exif()
    exif[0x112] = 6
    stream = BytesIO()
    Image.new("RGB", (30, 20)).save(stream, "PNG", exif=exif)
    data = stream.getvalue()
    start = data.index(b"eXIf") - 4
    chunk = data[start : start + 12 + int.from_bytes(data[start : start + 4], "big")]
    rest = data.replace(chunk, b"")
    end = rest.index(b"IEND") - 4
    return rest[:end] + chunk + rest[end:]


def test_the_size_of_a_png_takes_no_decoding(monkeypatch):
    """Also where its EXIF data, which may turn it, stand behind the pixels."""
    turned = png_with_exif_behind_the_pixels()
    assert image_size(turned) == (20, 30) and decode_image(turned).shape == (3, 30, 20)
    stream = BytesIO()
    Image.new("RGB", (30, 20)).save(stream, "PNG")
    monkeypatch.setattr(Image.Image, "load", pytest.fail)
    assert image_size(stream.getvalue()) == (30, 20)
    with pytest.raises(BadPicture, match="without its end"):
        image_size(stream.getvalue()[:-14])
