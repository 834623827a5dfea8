"""Image files <-> tensors, the same way for every picture that enters asymlift.

The rules: JPEG, PNG and WebP only, size checked before a pixel is decoded, turned upright by EXIF,
profiles converted to sRGB, alpha laid over white, 16 bits scaled (not clipped), first frame of an
animation. Pillow alone does none of these.

Shapes: image (3, H, W) uint8 RGB.
"""

import warnings
from functools import cache
from io import BytesIO
from typing import Any, Literal

import numpy as np
import torch
from PIL import Image, ImageCms, ImageOps, UnidentifiedImageError
from torch import Tensor

from asymlift.errors import BadData

FORMATS = ("JPEG", "PNG", "WEBP")  # Pillow's other decoders include EPS, which runs Ghostscript
FOREIGN = "not a JPEG, PNG or WebP image"
MAX_PIXELS = 8192 * 8192  # 268 MB as RGBA; a 400 kB file can claim far more

# Pillow warns from 89 million pixels on; MAX_PIXELS refuses them before that matters.
warnings.filterwarnings("ignore", category=Image.DecompressionBombWarning)


class BadPicture(BadData):
    """An image that cannot be used; `reason` is short and fixed, so that it can be counted."""

    def __init__(self, reason: str, detail: str = "") -> None:
        super().__init__(f"{reason} ({detail})" if detail else reason)
        self.reason, self.detail = reason, detail


def decode_image(data: bytes, *, max_pixels: int = MAX_PIXELS) -> Tensor:
    """(3, H, W) uint8 in sRGB; BadPicture when the file is broken, foreign or too large."""
    return picture_to_tensor(open_picture(data, max_pixels))


def image_size(data: bytes, *, max_pixels: int = MAX_PIXELS) -> tuple[int, int]:
    """(width, height) as decode_image will return it; nothing is decoded for it."""
    with Guard(), Image.open(BytesIO(data), formats=FORMATS) as picture:
        check_size(picture, max_pixels)
        # Looking for the EXIF data of a PNG, Pillow decodes it: they may stand behind the pixels.
        has_none = picture.format == "PNG" and not exif_in_png(data)
        lies = not has_none and picture.getexif().get(ORIENTATION, 1) in range(5, 9)
        width, height = picture.size
    return (height, width) if lies else (width, height)


ORIENTATION = 0x0112  # the EXIF tag; values 5 to 8 swap width and height


def exif_in_png(data: bytes) -> bool:
    """Whether a PNG has EXIF data, in their own chunk or as text; BadPicture where it is cut."""
    offset = len(PNG_SIGNATURE)
    while offset + 8 <= len(data):
        size, kind = int.from_bytes(data[offset : offset + 4], "big"), data[offset + 4 : offset + 8]
        if kind == b"IEND":
            return False
        content = data[offset + 8 : offset + 8 + 32]
        if kind == b"eXIf" or (kind in PNG_TEXT and content.startswith(b"Raw profile type exif")):
            return True
        offset += 12 + size
    raise BadPicture("image cannot be decoded", "a PNG without its end")


PNG_SIGNATURE = b"\x89PNG\r\n\x1a\n"
PNG_TEXT = (b"tEXt", b"zTXt", b"iTXt")


class Guard:
    """Whatever a decoder raises on hostile bytes leaves as a BadPicture."""

    def __enter__(self) -> None:
        pass

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        if error is None or isinstance(error, BadPicture | MemoryError):
            return
        if isinstance(error, UnidentifiedImageError):
            raise BadPicture(FOREIGN) from None
        if isinstance(error, Image.DecompressionBombError):
            raise BadPicture("too many pixels", f"more than {MAX_PIXELS}") from None
        if isinstance(error, Exception):
            text = " ".join(str(error).split())[:100] or type(error).__name__
            raise BadPicture("image cannot be decoded", text) from None


def open_picture(data: bytes, max_pixels: int) -> Image.Image:
    """Decoded, upright, RGB."""
    with Guard(), Image.open(BytesIO(data), formats=FORMATS) as picture:
        check_size(picture, max_pixels)
        picture.load()
        deep = picture.mode == "I" or picture.mode.startswith("I;16")
        upright = sixteen_bits(picture) if deep else picture
        ImageOps.exif_transpose(upright, in_place=True)
        return flatten(upright)


def check_size(picture: Image.Image, max_pixels: int) -> None:
    width, height = picture.size
    if width * height > max_pixels:
        raise BadPicture("too many pixels", f"{width} x {height}, the limit is {max_pixels}")


def sixteen_bits(picture: Image.Image) -> Image.Image:
    """16-bit grey to 8 bits: 65535 is 255. `convert` would clip everything above 255 to white."""
    levels = np.asarray(picture).astype(np.uint32)
    small = Image.fromarray(((levels + 128) // 257).clip(0, 255).astype(np.uint8))
    facts = dict(picture.info)  # with EXIF and the profile
    clear = facts.pop("transparency", None)
    if clear is not None:
        small.putalpha(Image.fromarray(levels != clear).convert("L"))
    small.info = facts
    return small


def flatten(picture: Image.Image) -> Image.Image:
    """RGB in sRGB, alpha over white."""
    alpha = None
    if picture.has_transparency_data:
        layered = picture if picture.mode == "LA" else picture.convert("RGBA")
        alpha = layered.getchannel("A")
        picture = layered.convert("L" if layered.mode == "LA" else "RGB")
    elif picture.mode not in PROFILE_SPACES:  # 1 bit, palette
        picture = picture.convert("RGB")
    color = to_srgb(picture)
    if alpha is None:
        return color
    paper = Image.new("RGB", color.size, "white")
    paper.paste(color, mask=alpha)
    return paper


PROFILE_SPACES = {"RGB": "RGB", "L": "GRAY", "CMYK": "CMYK"}


def to_srgb(picture: Image.Image) -> Image.Image:
    """Apply the embedded profile; one that is broken or of another colour space is ignored."""
    embedded = picture.info.get("icc_profile")
    if embedded:
        try:
            profile = ImageCms.ImageCmsProfile(BytesIO(embedded))
            fits = profile.profile.xcolor_space.strip() == PROFILE_SPACES[picture.mode]
            if fits and "srgb" not in ImageCms.getProfileDescription(profile).lower():
                converted = ImageCms.profileToProfile(picture, profile, srgb(), outputMode="RGB")
                assert converted is not None  # None is for inPlace only
                return converted
        except (OSError, ImageCms.PyCMSError):
            pass
    return picture if picture.mode == "RGB" else picture.convert("RGB")


@cache
def srgb() -> ImageCms.ImageCmsProfile:
    return ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB"))


def picture_suffix(data: bytes) -> str:
    """.png, .jpg or .webp by the first bytes, whatever the file is called."""
    if data.startswith(PNG_SIGNATURE):
        return ".png"
    if data.startswith(b"\xff\xd8\xff"):
        return ".jpg"
    if data.startswith(b"RIFF") and data[8:12] == b"WEBP":
        return ".webp"
    raise BadPicture(FOREIGN)


def reads_plainly(data: bytes, image: Tensor) -> bool:
    """Whether a reader that knows none of the rules above sees exactly `image` in this file.

    Never for a file of several frames: such a reader may take it for a film.
    """
    with Guard(), Image.open(BytesIO(data), formats=FORMATS) as picture:
        if picture.size != (image.shape[2], image.shape[1]):
            return False
        if getattr(picture, "n_frames", 1) > 1:
            return False
        return torch.equal(picture_to_tensor(picture.convert("RGB")), image)


def encode_png(image: Tensor) -> bytes:
    """A (3, H, W) uint8 image as a PNG file; the same bytes every time."""
    return encode_picture(image, "png")


def encode_picture(image: Tensor, kind: Literal["png", "jpeg", "webp"], quality: int = 95) -> bytes:
    """Without metadata, the same bytes every time; colour at full resolution in JPEG."""
    if kind == "png":
        return saved(image, "PNG")
    if kind == "webp":
        return saved(image, "WEBP", quality=quality)
    options: dict[str, Any] = {"quality": quality, "subsampling": "4:4:4"}
    try:
        return saved(image, "JPEG", optimize=True, **options)
    except OSError:  # noise: more bytes than Pillow sets aside for a file it optimizes
        return saved(image, "JPEG", **options)


def saved(image: Tensor, kind: str, **options: Any) -> bytes:
    stream = BytesIO()
    tensor_to_picture(image).save(stream, format=kind, **options)
    return stream.getvalue()


def resize_image(image: Tensor, height: int, width: int) -> Tensor:
    """Lanczos on 8 bits; the image itself when it has that size already."""
    if image.shape[-2:] == (height, width):
        return image
    picture = tensor_to_picture(image).resize((width, height), Image.Resampling.LANCZOS)
    return picture_to_tensor(picture)


def image_to_float(image: Tensor) -> Tensor:
    """uint8 -> float32 in [-1, 1]."""
    return image.float() / 127.5 - 1


def float_to_image(image: Tensor) -> Tensor:
    """[-1, 1] -> uint8, rounded and clamped."""
    return ((image.float() + 1) * 127.5).round().clamp(0, 255).to(torch.uint8)


def picture_to_tensor(picture: Image.Image) -> Tensor:
    """Channel by channel out of Pillow: faster than permuting (H, W, 3), by a sixth of a decode."""
    channels = [np.frombuffer(picture.tobytes("raw", name), np.uint8) for name in "RGB"]
    return torch.from_numpy(np.stack(channels)).view(3, picture.height, picture.width)


def tensor_to_picture(image: Tensor) -> Image.Image:
    """Channel by channel likewise: an eighth of the time of permuting."""
    planes = image.contiguous().cpu().numpy()
    size = image.shape[-1], image.shape[-2]
    bands = [Image.frombuffer("L", size, plane, "raw", "L", 0, 1) for plane in planes]
    return Image.merge("RGB", bands)
