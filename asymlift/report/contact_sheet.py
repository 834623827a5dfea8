"""Many pictures on one page, each with its caption below.

Shapes: image (3, H, W) uint8.
"""

import math
from collections.abc import Sequence
from io import BytesIO

from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from asymlift.data.pictures import tensor_to_picture

COLUMNS, CELL, GUTTER = 8, 240, 8  # 8 cells of 240 pixels: 1992 in all
FONT_SIZE, LINE, LINES = 11, 14, 3  # of a caption


def contact_sheet(pictures: Sequence[tuple[Tensor, str]]) -> bytes:
    """A PNG, at most 2000 pixels wide; large pictures are reduced, small ones enlarged."""
    font = ImageFont.load_default(FONT_SIZE)
    columns = min(COLUMNS, math.ceil(math.sqrt(max(len(pictures), 1))))
    cells = [(fitted(image), wrapped(caption, font)) for image, caption in pictures]
    rows = [cells[start : start + columns] for start in range(0, len(cells), columns)]
    heights = [row_height(row) for row in rows]
    width = GUTTER + columns * (CELL + GUTTER)
    page = Image.new("RGB", (width, GUTTER + sum(height + GUTTER for height in heights)), "white")
    draw, top = ImageDraw.Draw(page), GUTTER
    for row, height in zip(rows, heights, strict=True):
        tallest = max(picture.height for picture, _ in row)
        for column, (picture, lines) in enumerate(row):
            left = GUTTER + column * (CELL + GUTTER)
            page.paste(
                picture, (left + (CELL - picture.width) // 2, top + tallest - picture.height)
            )
            for number, line in enumerate(lines):
                place = (left, top + tallest + 2 + number * LINE)
                draw.text(place, line, fill="black", font=font)
        top += height + GUTTER
    stream = BytesIO()
    page.save(stream, format="PNG")
    return stream.getvalue()


def row_height(row: Sequence[tuple[Image.Image, list[str]]]) -> int:
    return max(p.height for p, _ in row) + 2 + LINE * max(len(lines) for _, lines in row)


def fitted(image: Tensor) -> Image.Image:
    """Within a cell; never enlarged but by whole numbers, so that pixels stay sharp."""
    picture = tensor_to_picture(image)
    longest = max(picture.size)
    if longest <= CELL:
        times = CELL // longest
        size = (picture.width * times, picture.height * times)
        return picture.resize(size, Image.Resampling.NEAREST)
    size = (
        max(1, round(picture.width * CELL / longest)),
        max(1, round(picture.height * CELL / longest)),
    )
    return picture.resize(size, Image.Resampling.LANCZOS)


def wrapped(caption: str, font: ImageFont.FreeTypeFont | ImageFont.ImageFont) -> list[str]:
    """The first lines of a caption, each as wide as a cell; "..." where there is more."""
    lines, rest = list[str](), " ".join(caption.split())
    while rest and len(lines) < LINES:
        fits = longest_fit(rest, font)
        if fits < len(rest) and " " in rest[: fits + 1]:
            fits = rest.rindex(" ", 0, fits + 1)
        lines.append(rest[:fits])
        rest = rest[fits:].lstrip()
    if rest:
        last = lines[-1]
        while last and font.getlength(f"{last}...") > CELL:
            last = last[:-1]
        lines[-1] = f"{last}..."
    return lines


def longest_fit(text: str, font: ImageFont.FreeTypeFont | ImageFont.ImageFont) -> int:
    """How many characters fit into a line; at least one."""
    count = min(len(text), CELL)  # no character is narrower than a pixel
    while count > 1 and font.getlength(text[:count]) > CELL:
        count -= 1
    return count
