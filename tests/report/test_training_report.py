"""The page of a finetune says how it goes, draws what the run has, and what good looks like."""

import re
from html import unescape

import pytest
import torch

from asymlift.report import training_report
from asymlift.report.pictures import for_page, grid_png, reduced
from asymlift.report.training_figures import FIGURES
from asymlift.report.training_report import (
    TrainingRun,
    curve_sections,
    smooth,
    spread,
    training_page,
)


def line(step: int, **more) -> dict:
    return {
        "step": step,
        "loss": 1.0 / step,
        "loss_flow": 0.9 / step,
        "grad_norm": 2.0,
        "lr": 1e-4,
        "epoch": step / 10,
        "samples": 800 * step,
        "bad_samples": 3,
        "seconds": float(step),
        "seconds_waiting_for_data": step / 10,
        **more,
    }


LINES = [line(step) for step in range(1, 6)]
NOTHING = {"name": "x", "steps": 9, "state": "running"}


def run(tmp_path, metrics=LINES, **more) -> TrainingRun:
    return TrainingRun(**{**NOTHING, "metrics": metrics, "samples": tmp_path, **more})


def cells(html: str) -> list[tuple[str, str]]:
    rows = re.findall(r"<tr>(.*?)</tr>", html, re.S)
    return [tuple(re.findall(r"<td[^>]*>(.*?)</td>", row)) for row in rows]


# ---- state -------------------------------------------------------------------------------------


@pytest.mark.parametrize("metrics", [[], [{"step": 0, "validation_loss": 1.0}]])
def test_a_page_without_steps_says_so(tmp_path, metrics):
    html = training_page(run(tmp_path, metrics), now=lambda: 0.0)
    assert "No step has been taken yet." in html and "finetune x" in html
    assert "Previews" not in html
    assert "running, as of 1970-01-01 00:00:00 UTC; where that is long ago, the run was" in html


def test_the_state_is_the_last_line_the_usual_speed_and_the_way_of_the_validation_loss(tmp_path):
    validated = [(0, 4.0), (2, 1.0), (4, 2.0)]
    metrics = [{"step": 0, "validation_loss": 4.0}, *map(dict, LINES)]
    for step, loss in validated[1:]:
        metrics[step]["validation_loss"] = loss
    metrics[3] |= {"images_per_second": 7.0, "peak_gib": 2.5}
    metrics[5] |= {"images_per_second": 9.0, "peak_gib": 1.5, "seconds_to_go": 9000.0}
    html = training_page(run(tmp_path, metrics, state="finished"), now=lambda: 86400.0)
    assert cells(html) == [
        ("state", "finished, as of 1970-01-02 00:00:00 UTC"),
        ("steps", "5 of 9"),
        ("to go", "2 h 30 min"),
        ("samples", "4,000"),
        ("epochs", "0.500"),
        ("loss of the last step", "0.200"),
        ("validation loss, first", "4 (step 0)"),
        ("validation loss, best", "1 (step 2)"),
        ("validation loss, last", "2 (step 4)"),
        ("seconds per step", "3.000"),
        ("of them waiting for data", "0.300"),
        ("images per second", "8.000"),
        ("peak memory, GiB", "2.500"),
        ("bad samples, left out", "3"),
    ]


def test_a_last_loss_that_was_no_number_is_said(tmp_path):
    html = training_page(run(tmp_path, [*LINES, line(6, loss=None)]))
    assert ("loss of the last step", "not finite") in cells(html)


def test_bad_samples_are_counted_by_reason_and_a_run_without_any_has_no_section(tmp_path):
    html = training_page(run(tmp_path, left_out={"no image": 2, "shard is cut off": 1}))
    assert cells(html)[-2:] == [("no image", "2"), ("shard is cut off", "1")]
    assert "Bad samples" in html and "Bad samples" not in training_page(run(tmp_path))


def test_the_end_says_what_ran(tmp_path):
    start = {"recipe": "sha256:1", "versions": {"torch": "2.13", "peft": "0.21"}, "ranks": 8}
    html = training_page(run(tmp_path, about=start))
    assert cells(html)[-3:] == [
        ("recipe", "sha256:1"),
        ("versions", "torch 2.13; peft 0.21"),
        ("ranks", "8"),
    ]


# ---- curves ------------------------------------------------------------------------------------


def drawn(metrics, monkeypatch) -> dict[str, tuple[dict, bool]]:
    """Figure -> its series and whether it is logarithmic."""
    seen = {}

    def chart(series, x, y, *, log_y, whole_x, whole_y):
        assert x == "step" and whole_x and whole_y == (y == "updates left out")
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
        "seconds per step": ({"waiting for data"}, False),
        "learning rate": ({"learning rate"}, False),
    }
    assert seen["loss"][0]["loss"] == [(s, 1.0 / s) for s in range(1, 6)]


EVERYTHING = {
    "loss_perceptual": 0.1,
    "control": 0.4,
    "explained": 0.3,
    "skipped_reference": 0.0,
    "skipped_perceptual": 0.5,
    "skipped_updates": 0,
    "seconds_computing": 1.0,
    "loss_by_sigma": [None, 2.0, None, 4.0],
}


def test_what_is_not_in_every_line_is_drawn_where_it_is(monkeypatch):
    metrics = [
        {"step": 0, "validation_loss": 3.0, "validation_perceptual": 2.0},
        *(line(s, **EVERYTHING) for s in range(1, 5)),
    ]
    metrics[0] |= {"validation_by_level": [1.0, 2.0], "validation_sigma": [0.25, 0.75]}
    metrics[4] |= {"validation_loss": 1.0, "explained": None, "loss_by_sigma": [1.0, 2, None, 4]}
    metrics[4] |= {"validation_by_level": [0.5, 1.5], "validation_sigma": [0.25, 0.75]}
    metrics[2] |= {"gradient_variance": 1.0, "gradient_variance_plain": 2.0}
    seen = {title: series for title, (series, _) in drawn(metrics, monkeypatch).items()}
    assert seen.keys() == {figure.title for figure in FIGURES}
    assert seen["validation loss"] == {"flow": [(0, 3.0), (4, 1.0)], "perceptual": [(0, 2.0)]}
    assert seen["validation loss by noise level"] == {
        "noise 0.25": [(0, 1.0), (4, 0.5)],
        "noise 0.75": [(0, 2.0), (4, 1.5)],
    }
    assert seen["loss by noise level"] == {
        "noise 0.00 to 0.25": [(4, 1.0)],
        "noise 0.25 to 0.50": [(s, 2.0) for s in range(1, 5)],
        "noise 0.75 to 1.00": [(s, 4.0) for s in range(1, 5)],
    }
    assert seen["control variate"]["explained share"] == [(s, 0.3) for s in range(1, 4)]
    assert seen["gradient variance"] == {
        "variance reduced": [(2, 1.0)],
        "without the reference": [(2, 2.0)],
    }


def test_passes_that_are_never_left_out_need_no_figure(monkeypatch):
    off = {"skipped_reference": 0.0, "skipped_perceptual": 0.0, "skipped_updates": 0}
    seen = drawn([line(s, **off) for s in (1, 2)], monkeypatch)
    assert "samples that a pass leaves out" not in seen and "updates left out" in seen


def test_another_number_of_levels_begins_new_curves(monkeypatch):
    metrics = [
        {"step": 0, "validation_by_level": [1.0], "validation_sigma": [0.5]},
        {"step": 3, "validation_by_level": [1.0, 2.0], "validation_sigma": [0.25, 0.75]},
    ]
    seen = drawn(metrics, monkeypatch)["validation loss by noise level"][0]
    assert seen == {"noise 0.25": [(3, 1.0)], "noise 0.75": [(3, 2.0)]}


def test_every_figure_says_what_good_looks_like_and_stands_below_its_curve():
    assert all("Good" in f.meaning or "should" in f.meaning for f in FIGURES)
    html = unescape("".join(body for _, body in curve_sections([line(1, **EVERYTHING), line(2)])))
    shown = [figure for figure in FIGURES if figure.meaning in html]
    assert len(shown) == html.count("<svg ") == 8


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


@pytest.mark.parametrize(("count", "said"), [(200, ""), (600, "mean of up to 3 values")])
def test_a_figure_says_what_its_points_are_means_of(count, said):
    html = "".join(body for _, body in curve_sections([line(n) for n in range(1, count + 1)]))
    assert (said in html) if said else ("Every point is" not in html)


# ---- previews ----------------------------------------------------------------------------------


def preview(folder, step, image):
    path = folder / f"step-{step:06d}" / "grid.png"
    path.parent.mkdir()
    path.write_bytes(grid_png([("", image)]))
    return path


def test_the_newest_preview_comes_first_and_a_few_older_ones_follow(tmp_path):
    for step in (1000, 0, *range(10, 100, 10), 1_000_000):
        preview(tmp_path, step, torch.zeros(1, 3, 2, 2))
    (tmp_path / "step-000300").mkdir()  # no grid
    html = training_page(run(tmp_path))
    found = re.findall(r"step-\d+", re.sub(r'src="[^"]*"', "", html))
    steps = [int(name[5:]) for name in dict.fromkeys(found)]
    assert steps == [1_000_000, 0, 20, 40, 60, 80, 1000]
    assert html.count("data:image/png") == 7


def test_large_previews_are_made_smaller_so_that_the_page_stays_small(tmp_path):
    noise = torch.rand(4, 3, 512, 512) * 2 - 1
    large = [preview(tmp_path, step, noise) for step in range(8)]
    assert large[0].stat().st_size > 2_000_000
    html = training_page(run(tmp_path))
    assert html.count("data:image/jpeg") == 7
    assert len(html) < 3_000_000
    assert for_page(large[0], 5000, most_bytes=10**9) == (large[0].read_bytes(), "png")


def test_a_reduced_picture_keeps_its_shape_and_its_colours(tmp_path):
    path = preview(tmp_path, 0, torch.ones(1, 3, 100, 392))
    assert reduced(path, 200).size == (200, 54)
    assert reduced(path, 200).getpixel((100, 27)) == (255, 255, 255)
    assert reduced(path, 400).size == (400, 108)


@pytest.mark.parametrize("count", [1, 6, 7, 60])
def test_a_few_are_spread_over_all(count):
    chosen = spread(list(range(count)), 6)
    assert len(chosen) == min(count, 6) == len(set(chosen))
    assert (chosen[0], chosen[-1]) == (0, count - 1) and chosen == sorted(chosen)
