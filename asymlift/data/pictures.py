"""Image files <-> tensors, the same way for every picture that enters asymlift.

The rules: JPEG, PNG and WebP only, size checked before a pixel is decoded, turned upright by EXIF,
profiles converted to sRGB, alpha laid over white, 16 bits scaled (not clipped), first frame of an
animation. Pillow alone does none of these.

Shapes: image (3, H, W) uint8 RGB.
"""

import warnings
from functools import cache
from io import BytesIO

import numpy as np
import torch
from PIL import Image, ImageCms, ImageOps, UnidentifiedImageError
from torch import Tensor

from asymlift.errors import BadData

FORMATS = ("JPEG", "PNG", "WEBP")  # Pillow's other decoders include EPS, which runs Ghostscript
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
    """(width, height) as decode_image will return it; JPEG and WebP are not decoded for it."""
    with Guard(), Image.open(BytesIO(data), formats=FORMATS) as picture:
        check_size(picture, max_pixels)
        lies = picture.getexif().get(ORIENTATION, 1) in range(5, 9)
        width, height = picture.size
    return (height, width) if lies else (width, height)


ORIENTATION = 0x0112  # the EXIF tag; values 5 to 8 swap width and height


class Guard:
    """Whatever a decoder raises on hostile bytes leaves as a BadPicture."""

    def __enter__(self) -> None:
        pass

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        if error is None or isinstance(error, BadPicture | MemoryError):
            return
        if isinstance(error, UnidentifiedImageError):
            raise BadPicture("not a JPEG, PNG or WebP image") from None
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
    small.info["exif"] = picture.info.get("exif", b"")
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


def encode_png(image: Tensor) -> bytes:
    """A (3, H, W) uint8 image as a PNG file; the same bytes every time."""
    stream = BytesIO()
    tensor_to_picture(image).save(stream, format="PNG")
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
    return torch.from_numpy(np.array(picture)).permute(2, 0, 1).contiguous()


def tensor_to_picture(image: Tensor) -> Image.Image:
    return Image.fromarray(image.permute(1, 2, 0).contiguous().cpu().numpy(), "RGB")
