"""Names, captions and prompts from anywhere are text in the pages that asymlift writes."""

from html.parser import HTMLParser
from pathlib import Path

import pytest

from asymlift.report.html import figcaption, items, paragraph, picture, table
from asymlift.report.prepare_report import PrepareReport
from tests.stages.prepare.small_prepare import make_folder, recipe_for, run

MARKUP = "</title><script>alert(1)</script>\"'><img src=x onerror=alert(1)>&lt;"
NAME = "<img src=x onerror=alert(1)>"


class Active(HTMLParser):
    """Collects whatever could act: scripts, handlers, and addresses to load from."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.found: list[str] = []
        self.feed(page)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        if tag in ("script", "iframe", "object", "embed", "link", "base", "form"):
            self.found.append(tag)
        for name, value in attrs:
            loads = name in ("src", "href", "action", "xlink:href", "srcset")
            harmless = (value or "").startswith(("data:image/png;base64,", "#"))
            if name.startswith("on") or (loads and not harmless):
                self.found.append(f"{tag} {name}={value}")


def test_the_detector_detects():
    assert Active(f"<p>{MARKUP}</p>").found == ["script", "img src=x", "img onerror=alert(1)"]


@pytest.mark.parametrize(
    "page",
    [
        paragraph(MARKUP),
        paragraph(MARKUP, "good"),
        items([MARKUP]),
        table([[MARKUP, 1]], [MARKUP, MARKUP]),
        picture(b"", MARKUP),
        figcaption(MARKUP),
    ],
)
def test_every_part_of_a_page_escapes(page):
    assert Active(page).found == []
    assert "alert(1)" in page


@pytest.fixture(scope="module")
def prepared(tmp_path_factory) -> tuple[PrepareReport, Path]:
    folder = tmp_path_factory.mktemp("markup")
    source = make_folder(folder / "source", 8)
    for path in source.glob("*.txt"):
        path.write_text(MARKUP)
    (source / "000.png").rename(source / f"{NAME}.png")
    (source / f"{NAME}2.png").write_bytes(b"no picture")
    report = run(recipe_for(folder))
    return report, folder / "out"


def test_a_report_of_hostile_names_and_captions_is_only_text(prepared):
    report, out = prepared
    pages = [path.read_text() for path in out.glob("*.html")]
    assert pages
    assert all(Active(page).found == [] for page in pages)
    assert sum(report.rejected.values()) >= 1
