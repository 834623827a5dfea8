"""How a finetune went: curves from metrics.jsonl, and its previews."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import median
from typing import Any

from asymlift.report.charts import line_chart
from asymlift.report.html import drawing, page, paragraph, picture, table

CURVES = {  # figure -> what is drawn in it
    "loss": {"loss": "loss", "loss_flow": "flow", "loss_perceptual": "perceptual"},
    "gradient norm": {"grad_norm": "before clipping"},
    "control variate": {"control": "mean coefficient"},
    "learning rate": {"lr": "learning rate"},
}
LOGARITHMIC = {"loss", "gradient norm"}
MEANINGS = {
    "loss": "Mean over the good samples of a global batch.",
    "gradient norm": "Over everything that trains.",
    "control variate": "How much of the student's error the reference's error explains: the part "
    "that the student is not made to chase.",
    "learning rate": "Before the factors of optimizer.lr_scale.",
}


def training_page(
    title: str,
    metrics: Sequence[dict[str, Any]],
    samples: Path,
    left_out: Mapping[str, int] = {},
) -> str:
    """The whole page; `samples` holds the previews, `left_out` says why how many were not used."""
    sections = [("", summary(metrics)), *preview_sections(samples), *curve_sections(metrics)]
    if left_out:
        rows = table(list(left_out.items()), ("reason", "samples"))
        sections.append(("Bad samples", rows + paragraph("logs/skipped-*.jsonl names them.")))
    return page(title, sections)


def summary(metrics: Sequence[dict[str, Any]]) -> str:
    if not metrics:
        return paragraph("No step has been taken yet.")
    last = metrics[-1]
    seconds = median([line["seconds"] for line in metrics])
    waiting = median([line["seconds_waiting_for_data"] for line in metrics])
    rows = [
        ("steps", last["step"]),
        ("samples", last["samples"]),
        ("epochs", last["epoch"]),
        ("loss at the end", last["loss"]),
        ("seconds per step, median", seconds),
        ("of them waiting for data", waiting),
        ("bad samples, left out", last["bad_samples"]),
    ]
    return table(rows)


def curve_sections(metrics: Sequence[dict[str, Any]]) -> list[tuple[str, str]]:
    """One figure per group of curves that the run has."""
    sections = []
    for figure, curves in CURVES.items():
        series = {
            name: smooth([(line["step"], line[key]) for line in metrics if key in line])
            for key, name in curves.items()
        }
        series = {name: points for name, points in series.items() if points}
        if series:
            chart = line_chart(series, "step", figure, log_y=figure in LOGARITHMIC)
            sections.append((figure.capitalize(), drawing(chart, MEANINGS[figure])))
    return sections


def smooth(points: list[tuple[float, float]], most: int = 200) -> list[tuple[float, float]]:
    """At most so many points: means over equal stretches."""
    width = -(-len(points) // most)
    parts = [points[i : i + width] for i in range(0, len(points), width)] if width else []
    return [(part[-1][0], sum(y for _, y in part) / len(part)) for part in parts]


def preview_sections(samples: Path) -> list[tuple[str, str]]:
    grids = sorted(samples.glob("step-*/grid.png"))
    if not grids:
        return []
    pictures = [picture(grid.read_bytes(), grid.parent.name) for grid in grids]
    return [("Previews", "\n".join(pictures))]
