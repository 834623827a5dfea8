"""A run folder says what was run, and its recipe can be used again."""

import json

from asymlift.recipe import load_recipe
from asymlift.stages.provenance import record
from tests.stages.small_run import small_recipe


def test_the_resolved_recipe_is_a_recipe_again(tmp_path):
    recipe = small_recipe(tmp_path)
    record(recipe, "fit-basis")

    assert load_recipe(tmp_path / "run" / "config.yaml") == recipe


def test_commands_are_added_with_their_versions_and_a_damaged_file_begins_anew(tmp_path):
    recipe = small_recipe(tmp_path)
    record(recipe, "fit-basis")
    record(recipe, "convert")
    path = tmp_path / "run" / "run.json"
    commands = json.loads(path.read_bytes())["commands"]
    path.write_text("[")
    record(recipe, "finetune")

    assert [entry["command"] for entry in commands] == ["fit-basis", "convert"]
    assert commands[0]["versions"]["torch"]
    assert [e["command"] for e in json.loads(path.read_bytes())["commands"]] == ["finetune"]
