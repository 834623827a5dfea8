"""The page of a finetune draws what the run has, and says what each figure means."""

import re

import pytest
import torch

from asymlift.report import training_report
from asymlift.report.pictures import grid_png
from asymlift.report.training_report import curve_sections, smooth, summary, training_page


def line(step: int, **more: float) -> dict[str, float]:
    return {
        "step": step,
        "loss": 1.0 / step,
        "loss_flow": 0.9 / step,
        "grad_norm": 2.0,
        "lr": 1e-4,
        "epoch": step / 10,
        "samples": 8 * step,
        "bad_samples": 3,
        "seconds": float(step),
        "seconds_waiting_for_data": step / 10,
        **more,
    }


LINES = [line(step) for step in range(1, 6)]


def cells(html: str) -> list[tuple[str, str]]:
    rows = re.findall(r"<tr>(.*?)</tr>", html, re.S)
    return [tuple(re.findall(r"<td[^>]*>(.*?)</td>", row)) for row in rows]


def test_a_page_without_steps_says_so(tmp_path):
    html = training_page("finetune x", [], tmp_path)
    assert "No step has been taken yet." in html and "finetune x" in html
    assert "<figure" not in html and "Previews" not in html


def test_the_summary_is_the_last_line_and_the_median_time():
    shuffled = [LINES[i] for i in (4, 0, 2, 1)] + [line(5, seconds=3.0)]
    assert cells(summary(shuffled)) == [
        ("steps", "5"),
        ("samples", "40"),
        ("epochs", "0.500"),
        ("loss at the end", "0.200"),
        ("seconds per step, median", "3.000"),
        ("of them waiting for data", "0.300"),
        ("bad samples, left out", "3"),
    ]


def test_bad_samples_are_counted_by_reason_and_a_run_without_any_has_no_section(tmp_path):
    html = training_page("t", LINES, tmp_path, {"no image": 2, "shard is cut off": 1})
    assert cells(html)[-2:] == [("no image", "2"), ("shard is cut off", "1")]
    assert "Bad samples" in html and "Bad samples" not in training_page("t", LINES, tmp_path)


def drawn(metrics, monkeypatch) -> dict[str, tuple[dict, bool]]:
    """Figure -> its series and whether it is logarithmic."""
    seen = {}

    def chart(series, x, y, *, log_y):
        assert x == "step"
        seen[y] = (series, log_y)
        return "<svg/>"

    monkeypatch.setattr(training_report, "line_chart", chart)
    titles = [title for title, _ in curve_sections(metrics)]
    assert titles == [name.capitalize() for name in seen]
    return seen


def test_figures_hold_what_the_run_measured_and_no_more(monkeypatch):
    seen = drawn(LINES, monkeypatch)
    assert {y: (set(series), log) for y, (series, log) in seen.items()} == {
        "loss": ({"loss", "flow"}, True),
        "gradient norm": ({"before clipping"}, True),
        "learning rate": ({"learning rate"}, False),
    }
    assert seen["loss"][0]["loss"] == [(s, 1.0 / s) for s in range(1, 6)]
    everything = [line(s, loss_perceptual=0.1, control=0.4) for s in range(1, 4)]
    seen = drawn(everything, monkeypatch)
    assert set(seen["loss"][0]) == {"loss", "flow", "perceptual"}
    assert seen["control variate"] == ({"mean coefficient": [(s, 0.4) for s in (1, 2, 3)]}, False)


def test_every_figure_is_explained():
    assert training_report.MEANINGS.keys() == training_report.CURVES.keys()
    assert training_report.CURVES.keys() > training_report.LOGARITHMIC
    html = "".join(body for _, body in curve_sections([line(1, control=0.4), line(2, control=0.2)]))
    for meaning in training_report.MEANINGS.values():
        assert meaning.replace("'", "&#x27;") in html


@pytest.mark.parametrize("count", [0, 1, 199, 200, 201, 400, 401, 15000])
def test_long_curves_are_means_over_equal_stretches(count):
    points = [(float(x), 2.0 * x) for x in range(1, count + 1)]
    smoothed = smooth(points)
    assert len(smoothed) <= 200
    if count <= 200:
        assert smoothed == points
        return
    width = -(-count // 200)
    first = smoothed[0]
    assert first == (width, pytest.approx(width + 1))  # the mean of 2 .. 2 width
    assert smoothed[-1][0] == count
    lengths = [width] * (count // width) + ([count % width] if count % width else [])
    assert sum(y * n for (_, y), n in zip(smoothed, lengths, strict=True)) == pytest.approx(
        sum(y for _, y in points)
    )


def test_previews_come_in_order_and_only_where_there_are_any(tmp_path):
    png = grid_png([("", torch.zeros(1, 3, 2, 2))])
    for step in (1000, 0, 250):
        folder = tmp_path / f"step-{step:06d}"
        folder.mkdir()
        (folder / "grid.png").write_bytes(png)
    (tmp_path / "step-000300").mkdir()  # no grid
    html = training_page("t", LINES, tmp_path)
    found = re.findall(r"step-\d{6}", re.sub(r'src="[^"]*"', "", html))
    assert list(dict.fromkeys(found)) == ["step-000000", "step-000250", "step-001000"]
    assert html.count("data:image/png") == 3
