"""What never ends, or is nested too deeply, is refused with an ordinary error."""

import math
import os
import tracemalloc

import pytest

from asymlift.artifacts.parsing import MOST_JSON, json_text, parse_json, read_small


@pytest.mark.parametrize("text", ["[" * 100_000, '{"a":' * 100_000, "9" * 100_000, "{"])
def test_json_that_cannot_be_read_is_a_value_error(text):
    with pytest.raises(ValueError, match=r".+"):
        parse_json(text)


@pytest.mark.parametrize("item", ["[]", "{}", '{"":0}', "1.1", '[[{"a":[]}]]', '{"":[]}'])
def test_the_largest_json_takes_less_than_a_gibibyte(item):
    """Of all that is short to write and long to hold."""
    text = "[" + f"{item}," * (200_000 // len(item)) + "0]"
    tracemalloc.start()
    value = parse_json(text)
    _, most = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert len(value) > 10_000 and most / len(text) * MOST_JSON < 2**30


def test_what_is_written_is_strict_json():
    """Python writes NaN and Infinity, which are no JSON."""
    document = {"a": math.nan, "b": [1, -math.inf, (2.5, True)], "c": {"d": math.inf}, "e": "NaN"}
    text = json_text(document)
    assert text == '{"a": null, "b": [1, null, [2.5, true]], "c": {"d": null}, "e": "NaN"}'


def test_a_file_is_read_up_to_its_limit(tmp_path):
    path = tmp_path / "a"
    path.write_bytes(b"12345")
    assert read_small(path, 5) == b"12345"
    with pytest.raises(OSError, match="longer than 4 bytes"):
        read_small(path, 4)


def test_devices_pipes_and_folders_are_no_files(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "zero").symlink_to("/dev/zero")
    for name in ("pipe", "zero"):
        with pytest.raises(OSError, match="no regular file"):
            read_small(tmp_path / name)
    with pytest.raises(IsADirectoryError):
        read_small(tmp_path)
