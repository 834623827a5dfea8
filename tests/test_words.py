"""Numbers as people say them."""

import pytest

from asymlift.words import human_seconds


@pytest.mark.parametrize(
    ("seconds", "said"),
    [(0.4, "0 s"), (119, "119 s"), (150, "2 min"), (7300, "2 h 2 min"), (200_000, "2 d 8 h")],
)
def test_what_takes_long_is_said_in_hours_and_days(seconds, said):
    assert human_seconds(seconds) == said
