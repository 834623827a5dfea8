"""The parts of previews that need no model."""

import pytest

from asymlift.errors import BadRecipe
from asymlift.stages.finetune.preview import read_prompts

KEY = "finetune.preview.prompts"


def test_prompts_are_a_list_or_the_lines_of_a_file(tmp_path):
    assert read_prompts(["a", "b"], KEY) == ["a", "b"]
    file = tmp_path / "prompts.txt"
    file.write_text("  a red disc \n\n\u00e4 blue one\r\n \n", encoding="utf-8")
    assert read_prompts(str(file), KEY) == ["a red disc", "\u00e4 blue one"]


def test_prompts_that_are_not_there_are_refused(tmp_path):
    with pytest.raises(BadRecipe) as caught:
        read_prompts(str(tmp_path / "none.txt"), KEY)
    assert str(caught.value) == (
        f"{KEY}: {tmp_path / 'none.txt'} is no file; give a list of prompts, or a text file"
    )
    (tmp_path / "empty.txt").write_text(" \n\n")
    for nothing in ([], str(tmp_path / "empty.txt")):
        with pytest.raises(BadRecipe) as caught:
            read_prompts(nothing, KEY)
        assert str(caught.value) == f"{KEY}: there are no prompts"
