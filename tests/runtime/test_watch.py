"""Where a rank is, in words, and how long it may take there."""

import re
import time
import timeit
from concurrent.futures import ThreadPoolExecutor

from asymlift.runtime import watch


def test_a_place_is_said_in_words():
    watch.begin()
    assert str(watch.last) == "while starting"
    watch.at(5, "saving")
    assert str(watch.last) == "at step 5 while saving"
    watch.at(6, "reading data", "sample 7")
    assert str(watch.last) == "at step 6 while reading data (sample 7)"
    watch.going_on("sample 8")
    assert str(watch.last) == "at step 6 while reading data (sample 8)"


def test_whatever_comes_first_in_a_run_may_take_longer():
    watch.begin()
    watch.at(1, "updating")
    assert watch.last.patience == watch.FIRST_TIME > 1
    watch.at(2, "updating")
    assert watch.last.patience == 1
    watch.begin()
    watch.at(2, "updating")
    assert watch.last.patience == watch.FIRST_TIME


def test_going_on_begins_anew_and_time_stood_still_does_not_count():
    watch.at(1, "drawing")
    first = watch.last.since
    time.sleep(0.01)
    watch.going_on("second picture")
    again = watch.last.since
    assert again > first
    watch.forgive(100)
    assert watch.last.since == again + 100


def test_saying_it_costs_next_to_nothing():
    assert min(timeit.repeat(lambda: watch.at(1, "saving"), number=1000)) < 0.01  # 10 us each


def test_the_line_of_code_is_the_innermost_of_this_package(monkeypatch):
    """As another thread sees it: the main thread is in this file, called by nothing of asymlift."""
    with ThreadPoolExecutor(1) as other:
        assert other.submit(watch.line_of_code).result() == ""
        seen = lambda *_, **__: other.submit(watch.line_of_code).result()  # noqa: E731
        monkeypatch.setattr(watch, "last", None)  # puts back what was there
        monkeypatch.setattr(watch, "Place", seen)
        watch.at(1, "being within the package")
        assert re.fullmatch(r"runtime/watch\.py:\d+", watch.last)
