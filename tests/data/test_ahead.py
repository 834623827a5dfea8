"""Reading ahead changes when things are read, not what comes."""

import time

import pytest

from asymlift.data.ahead import read_ahead


@pytest.mark.parametrize("workers", [0, 1, 4])
def test_reading_ahead_keeps_the_order_and_stays_near(workers):
    begun = []

    def read(item: int) -> int:
        begun.append(item)
        time.sleep(0.001 * (item % 3))
        return item * item

    results = read_ahead(read, range(40), workers)
    for expected in range(10):
        assert next(results) == expected**2
    assert len(begun) <= 10 + 2 * workers + 1
    assert list(results) == [item**2 for item in range(10, 40)]


def test_reading_ahead_stops_with_its_reader():
    def read(item: int) -> int:
        if item == 3:
            raise ValueError("three")
        return item

    with pytest.raises(ValueError, match="three"):
        list(read_ahead(read, range(1000), 2))
    results = read_ahead(read, range(3), 2)
    next(results)
    results.close()
