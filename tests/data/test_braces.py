"""Braces stand for many names, but not for more than can be meant."""

import pytest

from asymlift.data.braces import expand_braces
from asymlift.errors import BadData


def test_ranges_lists_and_plain_names():
    assert expand_braces("a/{008..010}.tar") == ["a/008.tar", "a/009.tar", "a/010.tar"]
    assert expand_braces("{a,b}{0..1}") == ["a0", "a1", "b0", "b1"]
    assert expand_braces("plain.tar") == ["plain.tar"]
    assert expand_braces("{{a,b},{c,d},{e,f}}") == list("abcdef")


@pytest.mark.parametrize(
    "pattern",
    ["{0..99999999}", "{0..9999}{0..9999}", "{0..1" + "0" * 30 + "}", "{a,b}" * 40],
)
def test_more_names_than_anyone_means_are_refused_at_once(pattern):
    with pytest.raises(BadData, match="more than 1,000,000 names"):
        expand_braces(pattern)


def test_braces_that_do_not_close_are_named():
    with pytest.raises(BadData, match=r"\{a\.tar"):
        expand_braces("{a.tar")
