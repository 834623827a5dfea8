"""Small tables of text: drawn on a terminal, lines elsewhere."""

from collections.abc import Sequence

from rich.table import Table

from asymlift.runtime import log

Row = Sequence[str]


def show_table(title: str, rows: Sequence[Row]) -> list[str]:
    """Print it; returns its lines, for a file."""
    lines = plain_lines(title, rows)
    if log.is_live():
        drawn = Table(title=title, title_justify="left", show_header=False)
        for row in rows:
            drawn.add_row(*row)
        log.console.print(drawn, markup=False)
    else:
        for line in lines:
            log.say(line)
    return lines


def plain_lines(title: str, rows: Sequence[Row]) -> list[str]:
    """Columns as wide as their widest cell."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    padded = ("  ".join(map(str.ljust, row, widths)).rstrip() for row in rows)
    return [f"{title}:", *(f"  {line}" for line in padded)]
