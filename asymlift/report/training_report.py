"""How a finetune goes: its state, curves from metrics.jsonl, and its previews.

The page is written while the run goes on, so nothing on it needs a run that has ended.
"""

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median
from typing import Any

from asymlift.report.charts import line_chart
from asymlift.report.html import drawing, page, paragraph, picture, side_by_side, table
from asymlift.report.pictures import for_page
from asymlift.report.training_figures import FIGURES, Figure
from asymlift.words import human_seconds

MOST_POINTS = 200  # of a curve
RECENT = 100  # steps whose median is the speed
WIDE, NARROW, MOST_OLDER = 1600, 480, 6  # pixels of the newest preview and of older ones
Line = Mapping[str, Any]
Points = list[tuple[float, float]]


@dataclass(frozen=True)
class TrainingRun:
    """What a page is made of."""

    name: str
    steps: int  # that the recipe asks for
    state: str  # running, finished, stopped
    metrics: Sequence[Line]
    samples: Path  # the folder of the previews
    left_out: Mapping[str, int] = field(default_factory=dict)  # reason -> samples
    about: Mapping[str, Any] = field(default_factory=dict)  # the last start, as run.json has it


def training_page(run: TrainingRun, now: Callable[[], float] = time.time) -> str:
    """The whole page."""
    written = time.strftime("%Y-%m-%d %H:%M:%S UTC", time.gmtime(now()))
    sections = [
        ("", state_of(run, written)),
        *preview_sections(run.samples),
        *curve_sections(run.metrics),
    ]
    if run.left_out:
        rows = table(list(run.left_out.items()), ("reason", "samples"))
        sections.append(("Bad samples", rows + paragraph("logs/skipped-*.jsonl names them.")))
    if run.about:
        sections.append(("What ran", table(about(run.about))))
    return page(f"finetune {run.name}", sections)


# ---- state -------------------------------------------------------------------------------------


def state_of(run: TrainingRun, written: str) -> str:
    taken = [line for line in run.metrics if "loss" in line]  # others were validated alone
    said = f"{run.state}, as of {written}"
    if run.state == "running":
        said += "; where that is long ago, the run was killed: the same command resumes it"
    if not taken:
        return table([("state", said)]) + paragraph("No step has been taken yet.")
    last, recent = taken[-1], taken[-RECENT:]
    rows: list[tuple[str, object]] = [
        ("state", said),
        ("steps", f"{last['step']:,} of {run.steps:,}"),
        *([("to go", human_seconds(last["seconds_to_go"]))] if last.get("seconds_to_go") else []),
        ("samples", f"{last['samples']:,}"),
        ("epochs", last["epoch"]),
        ("loss of the last step", "not finite" if last["loss"] is None else last["loss"]),
        *validation_rows(run.metrics),
        ("seconds per step", median([line["seconds"] for line in recent])),
        ("of them waiting for data", median([line["seconds_waiting_for_data"] for line in recent])),
        *speed_rows(recent),
        ("bad samples, left out", last["bad_samples"]),
    ]
    return table(rows)


def validation_rows(metrics: Sequence[Line]) -> list[tuple[str, object]]:
    found = curve(metrics, "validation_loss")
    if not found:
        return []
    best = min(found, key=lambda point: point[1])
    return [
        ("validation loss, first", f"{found[0][1]:.4g} (step {found[0][0]:g})"),
        ("validation loss, best", f"{best[1]:.4g} (step {best[0]:g})"),
        ("validation loss, last", f"{found[-1][1]:.4g} (step {found[-1][0]:g})"),
    ]


def speed_rows(recent: Sequence[Line]) -> list[tuple[str, object]]:
    rows: list[tuple[str, object]] = []
    for key, name in (("images_per_second", "images per second"), ("peak_gib", "peak memory, GiB")):
        values = [value for _, value in curve(recent, key)]
        if values:
            rows.append((name, max(values) if key == "peak_gib" else median(values)))
    return rows


def about(start: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    """One row per fact of a start."""
    for name, value in start.items():
        if isinstance(value, Mapping):
            yield name, "; ".join(f"{key} {inner}" for key, inner in value.items())
        else:
            yield name, str(value)


# ---- curves ------------------------------------------------------------------------------------


def curve_sections(metrics: Sequence[Line]) -> list[tuple[str, str]]:
    """The figures that the run has something for, each with what good looks like."""
    sections = []
    for figure in FIGURES:
        drawn = dict(drawn_in(figure, metrics))
        off = figure.may_be_off and not any(y for points in drawn.values() for _, y in points)
        if drawn and not off:
            series = {name: smooth(points) for name, points in drawn.items()}
            chart = line_chart(
                series,
                "step",
                figure.title,
                log_y=figure.log,
                whole_x=True,
                whole_y=figure.counts,
            )
            longest = stretch(max(map(len, drawn.values())))
            note = f" Every point is the mean of up to {longest} values." if longest > 1 else ""
            sections.append((figure.title.capitalize(), drawing(chart, figure.meaning + note)))
    return sections


def drawn_in(figure: Figure, metrics: Sequence[Line]) -> Iterator[tuple[str, Points]]:
    """The curves of a figure, those of a list one by one."""
    for key, name in figure.curves.items():
        if points := curve(metrics, key):
            yield name, points
    if figure.parts:
        lines = [line for line in metrics if isinstance(line.get(figure.parts), list)]
        names = figure.names(lines[-1]) if lines else []
        for place, name in enumerate(names):
            unfolded = [
                {"step": line["step"], name: line[figure.parts][place]}
                for line in lines
                if len(line[figure.parts]) == len(names)
            ]
            if points := curve(unfolded, name):
                yield name, points


def curve(metrics: Sequence[Line], key: str) -> Points:
    """(step, value) wherever a line has such a number."""
    return [(line["step"], line[key]) for line in metrics if isinstance(line.get(key), int | float)]


def stretch(count: int, most: int = MOST_POINTS) -> int:
    """So many values share a point."""
    return -(-count // most)


def smooth(points: Points, most: int = MOST_POINTS) -> Points:
    """At most so many points: means over equal stretches."""
    width = stretch(len(points), most)
    parts = [points[i : i + width] for i in range(0, len(points), width)] if width else []
    return [(part[-1][0], sum(y for _, y in part) / len(part)) for part in parts]


# ---- previews ----------------------------------------------------------------------------------


def preview_sections(samples: Path) -> list[tuple[str, str]]:
    """The newest large, and a few older ones: a page with all of them would be too large."""
    grids = sorted(samples.glob("step-*/grid.png"), key=lambda grid: step_of(grid))
    if not grids:
        return []
    *older, newest = grids
    data, kind = for_page(newest, WIDE)
    said = (
        f"{newest.parent.name}, every picture from the same noise: the latent base, the model as "
        "converted, and now. Good: as sharp as the base or sharper, with the same content; grain, "
        "blocks or faded colours should go within the first thousands of steps."
    )
    parts = [picture(data, said, kind)]
    if older:
        shown = (for_page(grid, NARROW) for grid in spread(older, MOST_OLDER))
        names = [grid.parent.name for grid in spread(older, MOST_OLDER)]
        parts.append(
            side_by_side(
                picture(small, name, kind) for (small, kind), name in zip(shown, names, strict=True)
            )
        )
    return [("Previews", "\n".join(parts))]


def step_of(grid: Path) -> int:
    number = grid.parent.name.removeprefix("step-")
    return int(number) if number.isdigit() else -1


def spread(items: Sequence[Path], most: int) -> list[Path]:
    """At most so many, evenly over all, the first and the last among them."""
    if len(items) <= most:
        return list(items)
    return [items[round(place * (len(items) - 1) / (most - 1))] for place in range(most)]
