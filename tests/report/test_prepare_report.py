"""The page of a preparation: what is there, what was left out, and nothing that could run."""

import re

import torch

from asymlift.data.pictures import encode_png
from asymlift.report.prepare_report import MANY, PrepareReport, left_out, prepare_page, told

SHEET = encode_png(torch.zeros(3, 8, 8, dtype=torch.uint8))


def report(**changes):
    values = {
        "num_shards": 2,
        "num_samples": 1500,
        "num_bytes": 3_000_000_000,
        "buckets": {"1024 x 1024": 1400, "832 x 1216": 100},
        "bytes_per_part": {".jpg": 2_000_000_000, ".txt": 150},
        "rejected": {"too small": 7, "image cannot be decoded": 1},
        "rejected_samples": ["photos/<b>.png: too small (1 x 1)"],
        "made": {"family": "flux2", "vae": "sha256:" + "0" * 64, "resize": {"sides": [1024]}},
    }
    return values | changes


def page(**changes):
    return prepare_page(PrepareReport("out", complete=True, **report(**changes)), SHEET)


def rows(html):
    found = re.findall(r"<tr>(.*?)</tr>", html, re.S)
    return [tuple(re.findall(r"<td[^>]*>(.*?)</td>", row)) for row in found]


def test_the_page_says_what_is_there_and_what_is_not():
    html = page()
    assert all(said in html for said in ("1,500", "in 2 shards", "3.00 GB", "2,000.0 kB each"))
    assert ("1024 x 1024", "1400", "93.3%") in rows(html)
    assert ("too small", "7") in rows(html)
    assert ("image", "2.00 GB", "1,333.3 kB") in rows(html)
    assert "photos/&lt;b&gt;.png: too small" in html and "<b>.png" not in html
    assert "sha256:000000000000..." in html and "sides [1024]" in html
    assert html.count("data:image/png;base64,") == 1 and "Classes" not in html


def test_without_pictures_and_without_rejects_these_parts_say_so():
    html = prepare_page(PrepareReport("out", complete=True, **report(rejected={})), b"")
    assert "What the model will see" not in html and "<p>Nothing.</p>" in html


def test_missing_captions_and_what_would_help_are_said():
    html = page(num_without_caption=3, advice="smaller sides would keep 7 of 7")
    assert "3 of 1500 have no caption" in html and "<p>smaller sides would keep 7 of 7</p>" in html
    assert "have no caption" not in page() and "in 1 shard<" in page(num_shards=1)


def test_long_tables_end_in_a_sum():
    buckets = {f"{n} x 8": 2 for n in range(MANY + 5)}
    assert ("5 more", "10", "0.7%") in rows(page(buckets=buckets))


def test_classes_are_listed_with_their_numbers():
    names = [f"name {number}" for number in range(MANY + 1)]
    html = page(class_names=names)
    assert "0 name 0, 1 name 1" in html and f"{len(names)}: " in html
    assert f"{MANY} name {MANY}" not in html


def test_a_report_comes_back_from_its_facts():
    first = PrepareReport("out", complete=True, num_made=2, **report())
    again = PrepareReport.from_facts("out", first.facts())
    assert again.already_done and again.complete and again.num_made == 0
    assert again.facts() == first.facts() and again.num_rejected == 8
    by_name = {**report(), "buckets": {"1024 x 1024": 1, "832 x 1216": 9}}
    assert list(PrepareReport.from_facts("out", by_name).buckets) == ["832 x 1216", "1024 x 1024"]


def test_only_a_few_rejects_are_shown():
    shown = left_out(PrepareReport("o", complete=True, **report(rejected_samples=["x"] * 99)))
    assert shown.count("<li>") == MANY


def test_settings_are_told_in_a_few_characters():
    assert told({"sides": [32], "step": None}) == "sides [32], step None"
    assert told(None) == "None" and told("sha256:" + "a" * 64) == "sha256:aaaaaaaaaaaa..."
