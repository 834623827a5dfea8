"""A table is lines in a file and on a pipe, and drawn on a terminal."""

import io

import pytest
from rich.console import Console

from asymlift.runtime import log
from asymlift.runtime.tables import plain_lines, show_table

ROWS = [("step", "5 of 8", ""), ("finetune.steps", "8 -> 9", "safe")]
LINES = ["resumed:", "  step            5 of 8", "  finetune.steps  8 -> 9  safe"]


def test_columns_are_as_wide_as_their_widest_cell():
    assert plain_lines("resumed", ROWS) == LINES


@pytest.mark.parametrize("live", [False, True])
def test_it_is_drawn_only_on_a_terminal_and_its_lines_are_the_same(monkeypatch, live):
    monkeypatch.delenv("CI", raising=False)
    monkeypatch.delenv("NO_COLOR", raising=False)
    screen = io.StringIO()
    console = Console(file=screen, force_terminal=live, width=80, highlight=False)
    monkeypatch.setattr(log, "console", console)
    assert show_table("resumed", ROWS) == LINES
    drawn = screen.getvalue()
    assert "finetune.steps" in drawn and "8 -> 9" in drawn
    assert (drawn.splitlines() == LINES) is not live
