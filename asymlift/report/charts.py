"""Line charts as inline SVG, in the colours of the page around them (html.py)."""

import math
from collections.abc import Mapping, Sequence
from html import escape
from typing import NamedTuple

WIDTH, HEIGHT = 640, 320
LEFT, RIGHT, TOP, BOTTOM = 72, 28, 16, 48
LEGEND_LINE, LETTER = 22, 6.8  # height of a line of the legend, usual width of a letter
NUM_COLORS = 4  # --c0 ... --c3
MOST_MARKS = 40  # beyond that the points of a line would touch

Points = Sequence[tuple[float, float]]


class Axis(NamedTuple):
    """Maps values to places between two ends; values of a log axis are positive."""

    low: float
    high: float
    log: bool
    start: float
    end: float
    whole: bool = False  # of counts: no tick between two numbers

    def place(self, value: float) -> float:
        low, high = (math.log10(self.low), math.log10(self.high)) if self.log else self[:2]
        share = ((math.log10(value) if self.log else value) - low) / (high - low)
        return self.start + share * (self.end - self.start)


def line_chart(
    series: Mapping[str, Points],
    x_label: str,
    y_label: str,
    *,
    log_x: bool = False,
    log_y: bool = False,
    whole_x: bool = False,
    whole_y: bool = False,
) -> str:
    """Lines with a legend; what is not finite, or not positive on a log axis, is not drawn."""
    drawn = {
        name: [(x, y) for x, y in points if shown(x, log_x) and shown(y, log_y)]
        for name, points in series.items()
    }
    xs = [x for points in drawn.values() for x, _ in points]
    ys = [y for points in drawn.values() for _, y in points]
    if not xs:
        return f'<svg viewBox="0 0 {WIDTH} 40"><text x="8" y="24">nothing to draw</text></svg>'
    legend = legend_places(list(drawn))
    top = TOP + legend[-1][1]
    bottom = top + HEIGHT - TOP - BOTTOM
    x_axis = Axis(*limits(xs, log_x, snap=False), log_x, LEFT, WIDTH - RIGHT, whole_x)
    y_axis = Axis(*limits(ys, log_y, snap=True, whole=whole_y), log_y, bottom, top, whole_y)

    parts = [
        f'<svg viewBox="0 0 {WIDTH} {bottom + BOTTOM:.0f}" width="{WIDTH}" role="img" '
        f'aria-label="{escape(y_label)} against {escape(x_label)}">'
    ]
    for tick in ticks(x_axis):
        x = x_axis.place(tick)
        parts.append(f'<line class="grid" x1="{x:.1f}" x2="{x:.1f}" y1="{top}" y2="{bottom}"/>')
        parts.append(text(x, bottom + 18, readable(tick), "middle"))
    for tick in ticks(y_axis):
        y = y_axis.place(tick)
        parts.append(
            f'<line class="grid" x1="{LEFT}" x2="{x_axis.end}" y1="{y:.1f}" y2="{y:.1f}"/>'
        )
        parts.append(text(LEFT - 8, y + 4, readable(tick), "end"))
    corner = f"M{LEFT} {top}V{bottom}H{WIDTH - RIGHT}"
    parts.append(f'<path class="axis" fill="none" d="{corner}"/>')
    parts.append(text((LEFT + WIDTH - RIGHT) / 2, bottom + BOTTOM - 8, x_label, "middle"))
    middle = (top + bottom) / 2
    parts.append(
        f'<text x="14" y="{middle}" text-anchor="middle" transform="rotate(-90 14 {middle})">'
        f"{escape(y_label)}</text>"
    )
    for number, (name, points) in enumerate(drawn.items()):
        color, (left, line) = f"var(--c{number % NUM_COLORS})", legend[number]
        dash = ' stroke-dasharray="6 4"' if number >= NUM_COLORS else ""
        places = [(x_axis.place(x), y_axis.place(y)) for x, y in points]
        path = " ".join(f"{x:.1f},{y:.1f}" for x, y in places)
        parts.append(
            f'<polyline fill="none" stroke="{color}" stroke-width="2"{dash} points="{path}"/>'
        )
        if len(points) <= MOST_MARKS:
            for (x, y), (cx, cy) in zip(points, places, strict=True):
                title = escape(f"{name}: {readable(x)}, {readable(y)}")
                parts.append(
                    f'<circle cx="{cx:.1f}" cy="{cy:.1f}" r="3" fill="{color}">'
                    f"<title>{title}</title></circle>"
                )
        parts.append(
            f'<line x1="{left:.0f}" x2="{left + 18:.0f}" y1="{line - 4}" y2="{line - 4}" '
            f'stroke="{color}" stroke-width="3"{dash}/>'
        )
        parts.append(text(left + 24, line, name, "start"))
    return "".join([*parts, "</svg>"])


def legend_places(names: Sequence[str]) -> list[tuple[float, int]]:
    """Left end and baseline of each entry, in as many lines as they need."""
    places, left, line = [], float(LEFT), LEGEND_LINE
    for name in names:
        width = 44 + LETTER * len(name)
        if left + width > WIDTH and left > LEFT:
            left, line = float(LEFT), line + LEGEND_LINE
        places.append((left, line))
        left += width
    return places


def shown(value: float, log: bool) -> bool:
    return math.isfinite(value) and (value > 0 or not log)


def limits(
    values: Sequence[float], log: bool, *, snap: bool, whole: bool = False
) -> tuple[float, float]:
    """Ends of an axis; `snap` moves them out to the next tick."""
    low, high = min(values), max(values)
    if log:
        if snap or low == high:
            low, high = 1 / round_step(1 / low), round_step(high)
        return (low, high) if low < high * (1 - 1e-9) else (low / 10, high * 10)
    if low == high:
        reach = abs(low) / 2
        return (low - reach, high + reach) if reach else (0.0, 1.0)
    if snap:
        step = max(round_step((high - low) / 5), 1.0 if whole else 0.0)
        low, high = math.floor(low / step) * step, math.ceil(high / step) * step
    return low, high


def ticks(axis: Axis) -> list[float]:
    """Round values inside the axis, about five."""
    slack = (axis.high - axis.low) * 1e-9
    if not axis.log:
        step = max(round_step((axis.high - axis.low) / 5), 1.0 if axis.whole else 0.0)
        first, last = math.ceil((axis.low - slack) / step), math.floor((axis.high + slack) / step)
        return [number * step for number in range(first, last + 1)]
    decades = range(math.floor(math.log10(axis.low)), math.ceil(math.log10(axis.high)) + 1)
    thin = -(-len(decades) // 8)  # every second or third decade on a long axis
    mantissas = (1, 2, 5) if axis.high / axis.low < 300 else (1,)
    values = [float(f"{m}e{d}") for d in decades[::thin] for m in mantissas]
    return [value for value in values if axis.low * (1 - 1e-9) <= value <= axis.high * (1 + 1e-9)]


def round_step(step: float) -> float:
    """The next of 1, 2, 5, 10 times a power of ten."""
    power = 10.0 ** math.floor(math.log10(step))
    return next(factor * power for factor in (1, 2, 5, 10) if factor * power >= step * (1 - 1e-9))


def readable(value: float) -> str:
    """0.25, 1,000, 1e-07"""
    if value == int(value) and abs(value) < 1e6:
        return f"{int(value):,}"
    return f"{value:.4g}"


def text(x: float, y: float, content: str, anchor: str) -> str:
    return f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}">{escape(content)}</text>'
