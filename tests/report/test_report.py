"""Pages open offline, charts say what they show, grids keep every pixel."""

import re
import xml.etree.ElementTree as ElementTree
from io import BytesIO
from itertools import pairwise

import pytest
import torch
from PIL import Image

from asymlift.report.charts import Axis, legend_places, line_chart, readable, ticks
from asymlift.report.html import drawing, numbers, page, paragraph, picture, table
from asymlift.report.pictures import GUTTER, grid_png


def opened(png: bytes) -> Image.Image:
    picture = Image.open(BytesIO(png))
    assert picture.format == "PNG"
    return picture


# ---- grids -----------------------------------------------------------------------------------


def test_every_pixel_is_a_sharp_square():
    images = torch.rand(3, 3, 4, 5) * 2 - 1
    grid = opened(grid_png([("", images)], scale=3))
    assert grid.size == (GUTTER + 3 * (5 * 3 + GUTTER), GUTTER + 4 * 3 + GUTTER)
    levels = ((images + 1) * 127.5).round()
    for n in range(3):
        for row in range(4):
            for column in range(5):
                for dy, dx in [(0, 0), (2, 2)]:
                    x = GUTTER + n * (5 * 3 + GUTTER) + column * 3 + dx
                    y = GUTTER + row * 3 + dy
                    assert grid.getpixel((x, y)) == tuple(levels[n, :, row, column].int().tolist())


def test_rows_of_any_length_and_size_stand_below_each_other_with_their_labels():
    big, small = torch.zeros(2, 3, 32, 32), torch.zeros(5, 3, 8, 8)
    grid = opened(grid_png([("one\nlabel", big), ("another, much longer label", small)], 2))
    plain = opened(grid_png([("", big), ("", small)], 2))
    assert grid.width > plain.width and grid.height >= plain.height
    left = torch.tensor(list(grid.crop((0, 0, 40, grid.height)).convert("L").getdata()))
    assert left.min() < 100  # text
    assert grid.getpixel((grid.width - 1, 0)) == (255, 255, 255)


def test_out_of_range_is_clamped_and_not_finite_is_seen():
    images = (
        torch.tensor([2.0, -2.0, float("nan"), float("inf")]).view(4, 1, 1, 1).expand(4, 3, 1, 1)
    )
    grid = opened(grid_png([("", images)]))
    seen = [grid.getpixel((GUTTER + n * (1 + GUTTER), GUTTER)) for n in range(4)]
    assert seen == [(255, 255, 255), (0, 0, 0), (255, 0, 255), (255, 0, 255)]


def test_the_same_grid_has_the_same_bytes():
    images = torch.rand(2, 3, 8, 8)
    assert grid_png([("a", images)], 2) == grid_png([("a", images.clone())], 2)


# ---- pages -----------------------------------------------------------------------------------


def test_a_page_loads_nothing_from_anywhere():
    png = grid_png([("a", torch.zeros(1, 3, 4, 4))])
    chart = line_chart({"loss": [(1, 2), (2, 1)]}, "step", "loss")
    html = page("title", [("", numbers([("0.7", "R2", "good")])), ("one", picture(png, "caption"))])
    html += page("title", [("two", drawing(chart, "caption") + table([("a", 1.0)], ("k", "v")))])
    links = re.findall(r"""(?:src|href|url)\s*[=(]\s*["']?([^"')\s>]+)""", html)
    assert links and all(link.startswith("data:") for link in links)
    assert not re.search(r"https?://|//[a-z]|@import|<script", html)
    assert "prefers-color-scheme: dark" in html and "default-src 'none'" in html


def test_text_from_outside_cannot_become_markup():
    evil = '<script>alert("&")</script>'
    png = grid_png([("", torch.zeros(1, 3, 2, 2))])
    chart = line_chart({evil: [(1, 1), (2, 2)]}, evil, evil)
    parts = [paragraph(evil), numbers([(evil, evil, evil)]), table([(evil,)], (evil,))]
    html = page(evil, [(evil, "".join([*parts, picture(png, evil), drawing(chart, evil)]))])
    assert "<script" not in html


def test_a_page_is_well_formed():
    body = paragraph("a & b", "good") + table([("a", 1, 0.25)], ("name", "count", "share"))
    html = page("title", [("heading", body)]).replace("<!doctype html>", "")
    ElementTree.fromstring(re.sub(r"<meta[^>]*>", "", html))


def test_numbers_in_tables_stand_right_and_have_three_decimals():
    html = table([("a", 2, 1 / 3), ("b", 4, 2.0)], ("name", "count", "share"))
    assert html.count('class="n"') == 6
    assert "0.333" in html and ">2.000<" in html and ">4<" in html
    assert table([("a", "b")]).count("<tr>") == 1


# ---- charts ----------------------------------------------------------------------------------


def parsed(svg: str) -> ElementTree.Element:
    return ElementTree.fromstring(svg)


def points(svg: str) -> list[list[tuple[float, float]]]:
    lines = [node.attrib["points"] for node in parsed(svg) if node.tag == "polyline"]
    return [[tuple(map(float, p.split(","))) for p in line.split()] for line in lines]


def test_a_straight_line_is_drawn_straight_also_on_log_axes():
    linear = line_chart({"y": [(x, 3 * x) for x in range(5)]}, "x", "y")
    power = line_chart(
        {"y": [(2.0**n, 5.0**n) for n in range(5)]}, "x", "y", log_x=True, log_y=True
    )
    for svg in (linear, power):
        (line,) = points(svg)
        slopes = [(b[1] - a[1]) / (b[0] - a[0]) for a, b in pairwise(line)]
        assert max(slopes) - min(slopes) < 0.01 and max(slopes) < 0  # up is a smaller y


def test_what_cannot_be_drawn_is_left_out():
    nan, inf = float("nan"), float("inf")
    svg = line_chart({"y": [(1, 1), (2, nan), (3, inf), (4, 0), (5, 10)]}, "x", "y", log_y=True)
    assert [len(line) for line in points(svg)] == [2]
    for series in ({}, {"y": []}, {"y": [(1, nan)]}):
        assert "nothing to draw" in line_chart(series, "x", "y")


@pytest.mark.parametrize("values", [[5.0], [0.0], [-2.0, -2.0], [1e-9, 2e-9], [1e9, -1e9]])
def test_any_range_gives_finite_places(values):
    svg = line_chart({"y": list(enumerate(values, 1))}, "x", "y")
    parsed(svg)
    assert "nan" not in svg and "inf" not in svg


@pytest.mark.parametrize(
    "low, high, log, expected",
    [
        (0, 1, False, ["0", "0.2", "0.4", "0.6", "0.8", "1"]),
        (1, 1000, True, ["1", "10", "100", "1,000"]),
        (1, 100, True, ["1", "2", "5", "10", "20", "50", "100"]),
        (8, 150, True, ["10", "20", "50", "100"]),
        (1e-4, 1, True, ["0.0001", "0.001", "0.01", "0.1", "1"]),
        (-30, 70, False, ["-20", "0", "20", "40", "60"]),
    ],
)
def test_ticks_are_round_numbers(low, high, log, expected):
    assert [readable(tick) for tick in ticks(Axis(low, high, log, 0, 100))] == expected


@pytest.mark.parametrize(("high", "expected"), [(1, "0 1"), (3, "0 1 2 3"), (40, "0 10 20 30 40")])
def test_counts_have_no_ticks_between_whole_numbers(high, expected):
    chart = line_chart({"updates": [(1, 0), (3, high)]}, "step", "n", whole_x=True, whole_y=True)
    numbers = re.findall(r'text-anchor="(middle|end)">([\d.]+)<', chart)
    assert " ".join(n for anchor, n in numbers if anchor == "end") == expected
    assert [n for anchor, n in numbers if anchor == "middle"] == ["1", "2", "3"]


def test_long_legends_take_more_lines():
    places = legend_places(["a name of some length"] * 7)
    assert len({line for _, line in places}) > 1
    assert all(left + 100 < 640 for left, _ in places)
    svg = line_chart({f"series number {n}": [(1, n), (2, n)] for n in range(7)}, "x", "y")
    assert len(points(svg)) == 7
