"""Pictures for people: labelled rows of images as one PNG.

Shapes: images (n, 3, H, W) in [-1, 1].
"""

from collections.abc import Sequence
from io import BytesIO
from pathlib import Path

import torch
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor
from torch.nn import functional

GUTTER = 4
FONT_SIZE = 13


def grid_png(rows: Sequence[tuple[str, Tensor]], scale: int = 1) -> bytes:
    """One row of images per label, the label to its left, as a PNG.

    `scale` repeats every pixel that many times, so small images stay sharp. A label may have
    several lines. Rows may differ in the number and in the size of their images.
    """
    font = ImageFont.load_default(FONT_SIZE)
    ruler = ImageDraw.Draw(Image.new("RGB", (1, 1)))
    texts = [ruler.multiline_textbbox((0, 0), label, font=font) for label, _ in rows]
    margin = max((round(box[2]) for box in texts), default=0)
    margin += 2 * GUTTER if margin else 0

    strips = [strip(images, scale) for _, images in rows]
    heights = [
        max(line.height, round(box[3]) + GUTTER) for line, box in zip(strips, texts, strict=True)
    ]
    width = GUTTER + margin + max((line.width + GUTTER for line in strips), default=0)
    page = Image.new("RGB", (width, GUTTER + sum(heights) + GUTTER * len(rows)), "white")
    draw, top = ImageDraw.Draw(page), GUTTER
    for (label, _), line, box, height in zip(rows, strips, texts, heights, strict=True):
        middle = top + max(line.height - round(box[3]), 0) // 2
        draw.multiline_text((GUTTER, middle), label, fill="black", font=font)
        page.paste(line, (GUTTER + margin, top))
        top += height + GUTTER
    stream = BytesIO()
    page.save(stream, format="PNG")
    return stream.getvalue()


def strip(images: Tensor, scale: int) -> Image.Image:
    """The images side by side with white gutters; not finite is magenta, so that it is seen."""
    levels = (images.detach().float().cpu() + 1) * 127.5
    broken = ~levels.isfinite().all(1)
    pixels = levels.round().clamp(0, 255)
    for channel, value in enumerate((255, 0, 255)):
        pixels[:, channel].masked_fill_(broken, value)
    grown = pixels.to(torch.uint8).repeat_interleave(scale, 2).repeat_interleave(scale, 3)
    padded = functional.pad(grown, (0, GUTTER), value=255)  # (n, 3, H, W + gutter)
    line = padded.permute(2, 0, 3, 1).flatten(1, 2)[:, :-GUTTER]  # (H, n (W + gutter), 3)
    return Image.fromarray(line.contiguous().numpy(), "RGB")


def reduced(path: Path, widest: int) -> Image.Image:
    """A picture file, in RGB, at most so many pixels wide."""
    with Image.open(path) as picture:
        made = picture.convert("RGB")
    if made.width > widest:
        height = max(1, round(made.height * widest / made.width))
        made = made.resize((widest, height), Image.Resampling.LANCZOS, reducing_gap=2.0)
    return made


def for_page(path: Path, widest: int, most_bytes: int = 200_000) -> tuple[bytes, str]:
    """A picture file as a page takes it, and its kind: as it is, or smaller where it is large."""
    with Image.open(path) as picture:
        fits = picture.width <= widest and path.stat().st_size <= most_bytes
    if fits:
        return path.read_bytes(), "png"
    stream = BytesIO()
    reduced(path, widest).save(stream, format="JPEG", quality=88)
    return stream.getvalue(), "jpeg"
