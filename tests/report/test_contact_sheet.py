"""A page of pictures: all of them, in order, none distorted, each with its caption."""

from io import BytesIO

import numpy as np
import pytest
import torch
from PIL import Image, ImageFont

from asymlift.report.contact_sheet import (
    CELL,
    FONT_SIZE,
    GUTTER,
    LINES,
    contact_sheet,
    fitted,
    wrapped,
)

FONT = ImageFont.load_default(FONT_SIZE)


def colored(*color: int, height: int = CELL, width: int = CELL) -> torch.Tensor:
    return torch.tensor(color, dtype=torch.uint8)[:, None, None].expand(3, height, width)


def page_of(pictures: list[tuple[torch.Tensor, str]]) -> Image.Image:
    return Image.open(BytesIO(contact_sheet(pictures)))


def test_pictures_stand_in_rows_in_order():
    colors = [(250, 10 * n, 0) for n in range(9)]
    page = page_of([(colored(*color), "") for color in colors])
    step = CELL + GUTTER
    assert page.width == GUTTER + 3 * step
    middles = [(GUTTER + CELL // 2 + x * step, y) for y in (120, 370, 620) for x in range(3)]
    assert [page.getpixel(place) for place in middles] == colors


@pytest.mark.parametrize("number", [0, 1, 2, 7, 64])
def test_no_page_is_wider_than_2000_pixels(number):
    page = page_of([(colored(0, 0, 0, height=40), "a caption")] * number)
    assert page.width <= 2000 and page.format == "PNG"


@pytest.mark.parametrize(
    ("size", "shown"),
    [
        ((32, 32), (224, 224)),
        ((1024, 512), (240, 120)),
        ((1, 3000), (1, 240)),
        ((240, 7), (240, 7)),
    ],
)
def test_pictures_keep_their_shape(size, shown):
    width, height = size
    assert fitted(colored(1, 2, 3, height=height, width=width)).size == shown


def test_small_pictures_are_enlarged_in_sharp_squares():
    image = torch.randint(0, 256, (3, 32, 24), dtype=torch.uint8)
    grown = np.asarray(fitted(image))
    assert np.array_equal(grown[::7, ::7], image.permute(1, 2, 0).numpy())
    assert np.array_equal(grown, grown[::7, ::7].repeat(7, 0).repeat(7, 1))


def test_a_caption_is_broken_between_words_and_cut_where_there_is_no_place():
    assert wrapped("a red disc\n on  blue", FONT) == ["a red disc on blue"]
    assert wrapped("", FONT) == []
    words = [f"word{n}" for n in range(200)]
    lines = wrapped(" ".join(words), FONT)
    assert len(lines) == LINES and lines[-1].endswith("...")
    assert " ".join(lines[:-1]).split() == words[: len(" ".join(lines[:-1]).split())]
    assert all(FONT.getlength(line) <= CELL for line in lines)


@pytest.mark.parametrize("text", ["x" * 900, "W" * 900, "\u732b" * 300, "i " * 500])
def test_a_caption_without_words_fits_too(text):
    lines = wrapped(text, FONT)
    assert len(lines) == LINES
    assert all(FONT.getlength(line) <= CELL for line in lines)


def test_captions_are_on_the_page():
    plain, said = (page_of([(colored(255, 255, 255), text)]) for text in ("", "a red disc"))
    assert np.asarray(plain).min() == 255
    assert np.asarray(said).min() < 128
    assert said.height > plain.height
