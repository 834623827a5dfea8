"""A run folder says what was run, when and on what, and its recipe can be used again."""

import json
import sys

from asymlift.artifacts.manifest import digest_json
from asymlift.recipe import load_recipe
from asymlift.stages.provenance import add_to_start, record, record_start, resolved
from tests.stages.small_run import small_recipe


def commands(tmp_path):
    return json.loads((tmp_path / "run" / "run.json").read_bytes())["commands"]


def test_the_resolved_recipe_is_a_recipe_again(tmp_path):
    recipe = small_recipe(tmp_path)
    record(recipe, "fit-basis")

    assert load_recipe(tmp_path / "run" / "config.yaml") == recipe


def test_every_start_is_an_entry_and_a_damaged_file_begins_anew(tmp_path):
    recipe = small_recipe(tmp_path)
    record(recipe, "fit-basis")
    record(recipe, "convert")
    assert [entry["command"] for entry in commands(tmp_path)] == ["fit-basis", "convert"]
    (tmp_path / "run" / "run.json").write_text("[")
    record_start(recipe, "finetune")

    assert [entry["command"] for entry in commands(tmp_path)] == ["finetune"]


def test_an_entry_says_what_was_typed_when_and_on_what_without_secrets(tmp_path, monkeypatch):
    typed = ["/home/somebody/bin/asymlift", "finetune", "r.yaml", "--set", "a=https://u:pw@h/x?t=1"]
    monkeypatch.setattr(sys, "argv", typed)
    recipe = small_recipe(tmp_path)
    record_start(recipe, "finetune")

    [entry] = commands(tmp_path)
    assert entry["line"] == "asymlift finetune r.yaml --set 'a=https://***@h/x?***'"
    assert entry["at"].endswith("Z")
    assert entry["recipe"] == digest_json(resolved(recipe))
    assert entry["versions"].keys() >= {"asymlift", "python", "torch", "diffusers", "deepspeed"}
    assert entry["hardware"].keys() == {"gpus", "cpus", "memory", "system"}
    assert entry["hardware"]["memory"].endswith("iB")
    assert not (tmp_path / "run" / "config.yaml").exists()  # only a run that begins is a run


def test_what_is_known_later_goes_into_the_last_entry(tmp_path):
    recipe = small_recipe(tmp_path)
    record(recipe, "convert")
    record_start(recipe, "finetune")
    add_to_start(recipe, ranks=8, after_step=250)

    before, last = commands(tmp_path)
    assert (last["command"], last["ranks"], last["after_step"]) == ("finetune", 8, 250)
    assert "ranks" not in before
