"""What a run goes on from, and what its recipe may change meanwhile."""

import copy
import functools
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, get_args

import pytest
import torch
from pydantic import BaseModel

from asymlift.artifacts.checkpoint import (
    EMA,
    OPTIMIZER,
    TRAINABLE,
    Checkpoint,
    committing,
    open_checkpoint,
    step_folder,
    steps_on_disk,
)
from asymlift.artifacts.safetensors_stream import save_tensors
from asymlift.errors import BadData, CannotWrite, Exit
from asymlift.recipe import DataSection, FinetuneSection, ModelSection, check_recipe
from asymlift.runtime.tables import plain_lines
from asymlift.stages.finetune.resume import (
    CLASSES,
    FLAG,
    NEEDED,
    REFUSED,
    SAFE,
    Change,
    check_changes,
    chosen_checkpoint,
    class_of,
    find_changes,
    recipe_facts,
    restored_rows,
)

SECTIONS = {"model": ModelSection, "data": DataSection, "finetune": FinetuneSection}
RECIPE: dict[str, Any] = {
    "name": "x",
    "model": {"base": "/home/somebody/base"},
    "data": {"train": "/home/somebody/{000..009}.tar"},
}


def leaves(prefix: str, section: type[BaseModel]) -> Iterator[str]:
    """The dotted names of all values below a section, through unions."""
    for name, field in section.model_fields.items():
        key, inner = f"{prefix}.{name}", sections_in(field.annotation)
        if not inner:
            yield key
        for one in inner:
            yield from leaves(key, one)


def sections_in(annotation: Any) -> list[type[BaseModel]]:
    choices = [annotation, *get_args(annotation)]
    return [c for c in choices if isinstance(c, type) and issubclass(c, BaseModel)]


KEYS = [key for prefix, section in SECTIONS.items() for key in leaves(prefix, section)]


def test_every_key_that_enters_training_has_exactly_one_class():
    """A new key has to be put into a class before a run can change it."""
    assert {"finetune.ema.gamma", "finetune.train.lora.rank", "data.caption.lines"} <= set(KEYS)
    for key in KEYS:
        covering = [known for known in CLASSES if f"{key}.".startswith(f"{known}.")]
        assert len(covering) == 1, key


def test_every_class_is_of_a_key_that_there_is():
    for known in CLASSES:
        if known.startswith(tuple(f"{section}." for section in SECTIONS)):
            assert any(f"{key}.".startswith(f"{known}.") for key in KEYS), known


@pytest.mark.parametrize(
    ("key", "verdict"),
    [
        ("finetune.seed", REFUSED),
        ("finetune.batch", REFUSED),
        ("finetune.train", REFUSED),
        ("finetune.train.lora.rank", REFUSED),
        ("fingerprints.lifted", REFUSED),
        ("finetune.loss.weight", FLAG),
        ("finetune.time.shift", FLAG),
        ("finetune.ema.kind", FLAG),
        ("finetune.precision", FLAG),
        ("data.caption_dropout", FLAG),
        ("data.caption.source", FLAG),
        ("finetune.optimizer.kind", FLAG),
        ("fingerprints.data", FLAG),
        ("finetune.ema", FLAG),  # one that came or went: as strict as its strictest key
        ("finetune.optimizer.lr", SAFE),
        ("finetune.optimizer.betas", SAFE),
        ("finetune.schedule.warmup", SAFE),
        ("finetune.clip", SAFE),
        ("finetune.micro_batch", SAFE),
        ("finetune.zero.stage", SAFE),
        ("finetune.steps", SAFE),
        ("versions.torch", SAFE),
    ],
)
def test_a_key_is_as_strict_as_what_depends_on_it(key, verdict):
    assert class_of(key) == verdict


# ---- what changed --------------------------------------------------------------------------------


def facts(**finetune: Any) -> dict[str, Any]:
    recipe = check_recipe({**RECIPE, "finetune": finetune}, "test")
    return {
        **recipe_facts(recipe),
        "fingerprints": {"lifted": "sha256:aa", "data": "sha256:bb"},
        "versions": {"torch": "2.13"},
        "parameters": [["a.weight", [2, 3], "first"], ["b.weight", [3], "lora"]],
        "ranks": 2,
    }


def saved(checkpoints: Path, step: int, state: dict[str, Any] | None = None) -> Checkpoint:
    counts = {"samples": 8 * step, "seen": 8 * step, "bad": 3, "updates": step - 1, "not_finite": 0}
    tensors = {"a.weight": torch.zeros(2, 3), "b.weight": torch.zeros(3)}
    moments = {f"{key}/{name}": t for name, t in tensors.items() for key in ("m", "v")}
    with committing(checkpoints, step, {**counts, **(state or facts())}) as staged:
        for file, held in ((TRAINABLE, tensors), (EMA, tensors), (OPTIMIZER, moments)):
            save_tensors(staged / file, held)
    return open_checkpoint(step_folder(checkpoints, step))


def damaged(checkpoints: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    """As somebody leaves it who writes a state, and its manifest, by hand."""
    counts = {"updates": 1, "samples": 8, "seen": 8, "bad": 0, "not_finite": 0}
    state = copy.deepcopy({**counts, **facts()})
    change(state)
    with committing(checkpoints, 1, state) as staged:
        (staged / TRAINABLE).touch()


@pytest.mark.parametrize("key", NEEDED)
def test_a_state_that_lacks_what_going_on_needs_is_refused_by_file_and_key(tmp_path, key):
    *outer, name = key.split(".")

    def inside(state: dict[str, Any]) -> dict[str, Any]:
        return functools.reduce(lambda part, word: part[word], outer, state)

    for folder, said, change in (
        ("a", "is missing", lambda state: inside(state).pop(name)),
        ("b", "is not as a checkpoint has it", lambda s: inside(s).update({name: 0.5})),
    ):
        damaged(tmp_path / folder, change)
        with pytest.raises(BadData, match=rf"step-000001/state\.json: `{key}` {said}"):
            chosen_checkpoint(tmp_path / folder, "auto")


def test_a_parameter_without_name_shape_or_role_is_refused(tmp_path):
    damaged(tmp_path, lambda state: state["parameters"].append(["c.weight", [3, "x"], "lora"]))
    with pytest.raises(BadData, match=r'`parameters` has \["c.weight", \[3, "x"\], "lora"\]'):
        chosen_checkpoint(tmp_path, "auto")


@pytest.fixture
def checkpoint(tmp_path) -> Checkpoint:
    return saved(tmp_path / "checkpoints", 5)


def test_what_did_not_change_is_no_change(checkpoint):
    assert check_changes(checkpoint, facts(), allowed=False) == []


def test_safe_changes_are_listed_with_old_and_new(checkpoint):
    now = facts(steps=20, optimizer={"lr": 5e-4}, clip=None, zero={"stage": 1})
    now["versions"] = {"torch": "2.14"}
    told = [str(change) for change in check_changes(checkpoint, now, allowed=False)]
    assert set(told) == {
        "finetune.steps 15000 -> 20",
        "finetune.optimizer.lr 0.0001 -> 0.0005",
        'finetune.clip {"from_step": 100, "norm": 200.0} -> null',
        "finetune.zero.stage 2 -> 1",
        "versions.torch 2.13 -> 2.14",
    }


def test_what_is_trained_changes_only_with_the_flag(checkpoint):
    now = facts(loss={"weight": 5.0}, ema=None)
    now["fingerprints"] = {"lifted": "sha256:aa", "data": "sha256:cc"}
    with pytest.raises(BadData) as caught:
        check_changes(checkpoint, now, allowed=False)
    said = str(caught.value)
    assert caught.value.exit == Exit.BAD_DATA
    assert said.startswith(f"{checkpoint.folder}: what is trained is no longer the same: ")
    assert "finetune.loss.weight 10.0 -> 5.0" in said
    assert "finetune.ema {" in said
    assert "the training data (from here on, samples come in another order) sha256:bb" in said
    assert said.endswith(
        "to go on like that, add --allow-changes; to begin anew, use another `name`"
    )
    allowed = check_changes(checkpoint, now, allowed=True)
    assert [change.verdict for change in allowed] == [FLAG] * 3


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda now: now["finetune"].update(seed=1), "finetune.seed 0 -> 1"),
        (lambda now: now["finetune"].update(batch=8), "finetune.batch 256 -> 8"),
        (lambda now: now["finetune"].update(train="full"), "-> full"),
        (
            lambda now: now["fingerprints"].update(lifted="sha256:zz"),
            "the lifted model sha256:aa -> sha256:zz",
        ),
    ],
)
def test_what_makes_it_another_run_is_refused_even_with_the_flag(checkpoint, change, said):
    now = facts()
    change(now)
    with pytest.raises(BadData) as caught:
        check_changes(checkpoint, now, allowed=True)
    assert said in str(caught.value)
    assert "that cannot change in a run: use another `name`, or set it back" in str(caught.value)


@pytest.mark.parametrize(
    "parameters",
    [
        [["b.weight", [3], "lora"], ["a.weight", [2, 3], "first"]],
        [["a.weight", [3, 2], "first"], ["b.weight", [3], "lora"]],
        [["a.weight", [2, 3], "first"]],
    ],
)
def test_other_names_shapes_or_order_are_refused(checkpoint, parameters):
    now = {**facts(), "parameters": parameters}
    with pytest.raises(BadData, match="other parameters were trained, or in another order"):
        check_changes(checkpoint, now, allowed=True)


def test_an_optimizer_changes_only_into_one_that_remembers_alike(tmp_path):
    train = {"modules": ["blocks.0.attn"]}
    alike, other = (facts(optimizer={"kind": k}, train=train) for k in ("adamw_8bit", "muon"))
    checkpoint = saved(tmp_path, 5, facts(train=train))
    with pytest.raises(BadData, match="add --allow-changes"):
        check_changes(checkpoint, alike, allowed=False)
    [change] = check_changes(checkpoint, alike, allowed=True)
    assert str(change) == "finetune.optimizer.kind adamw -> adamw_8bit"
    with pytest.raises(BadData, match="muon cannot go on from what adamw remembers"):
        check_changes(checkpoint, other, allowed=True)


def test_no_path_gets_into_a_checkpoint_but_a_move_shows():
    here = facts()
    assert "somebody" not in json.dumps(here)
    moved = copy.deepcopy(RECIPE)
    moved["data"]["train"] = "/mnt/{000..009}.tar"
    there = {**here, **recipe_facts(check_recipe(moved, "test"))}
    [change] = find_changes(here, there)
    assert (change.key, change.verdict) == ("data.train", SAFE)


def test_a_table_says_what_was_restored_and_what_changed(checkpoint):
    now = facts(steps=20, loss={"shift": 0.5}, zero={"stage": 3}, ema=None)
    now["ranks"] = 1
    rows = restored_rows(checkpoint, now, check_changes(checkpoint, now, allowed=True))
    lines = plain_lines("resumed", rows)
    table = {row[0]: row[1:] for row in rows}
    assert table["step"] == ("5 of 20", "")
    assert table["samples"] == ("40", "")
    assert table["weights"] == ("2 tensors, 36 bytes", "")
    assert table["average"] == ("left behind", "")
    assert table["optimizer"] == ("4 tensors, 72 bytes, 4 updates", "")
    assert table["ledger"] == ("40 samples read, 3 of them bad", "")
    assert table["layout"] == ("ZeRO 2 on 2 ranks -> ZeRO 3 on 1 rank", "")
    assert table["finetune.loss.shift"] == ("0.3 -> 0.5", "allowed by --allow-changes")
    assert table["finetune.steps"] == ("15000 -> 20", "safe")
    assert lines[0] == "resumed:" and len(lines) == len(rows) + 1
    assert restored_rows(checkpoint, facts(), [])[3] == ("average", "2 tensors, 36 bytes", "")


def test_an_average_that_was_not_kept_begins_with_the_weights(tmp_path):
    found = saved(tmp_path, 5)
    (found.folder / EMA).unlink()
    assert restored_rows(found, facts(), [])[3][1] == "begins with the weights"
    none = facts(ema=None)
    assert restored_rows(found, none, [])[3][1] == "none"


def test_long_values_are_cut(checkpoint):
    now = facts(preview={"prompts": ["a very long prompt " * 20]})
    [change] = check_changes(checkpoint, now, allowed=False)
    assert isinstance(change, Change) and len(change.new) < 70


# ---- which checkpoint ----------------------------------------------------------------------------


def damage(folder: Path) -> None:
    path = folder / TRAINABLE
    path.write_bytes(path.read_bytes()[:-1] + b"x")


def test_auto_takes_the_newest_whole_one_and_says_which_it_left(tmp_path, capfd):
    assert chosen_checkpoint(tmp_path / "none", "auto") is None
    saved(tmp_path, 5)
    damage(saved(tmp_path, 6).folder)
    found = chosen_checkpoint(tmp_path, "auto")
    assert found is not None and found.step == 5
    assert "step-000006" in capfd.readouterr().err


def test_none_begins_anew_but_never_over_checkpoints(tmp_path):
    assert chosen_checkpoint(tmp_path, "none") is None
    saved(tmp_path, 5)
    with pytest.raises(CannotWrite) as caught:
        chosen_checkpoint(tmp_path, "none")
    assert caught.value.exit == Exit.CANNOT_WRITE
    assert str(caught.value) == (
        f"{tmp_path}: holds step 5, and --resume none would begin anew;\n"
        "use another `name`, or move the checkpoints away"
    )
    assert steps_on_disk(tmp_path) == [5]


def test_a_path_that_is_not_there_is_never_a_fresh_start(tmp_path):
    with pytest.raises(BadData) as caught:
        chosen_checkpoint(tmp_path, str(tmp_path / "step-000007"))
    assert caught.value.exit == Exit.BAD_DATA
    assert "there is no such checkpoint; give a folder such as" in str(caught.value)
    saved(tmp_path / "other" / tmp_path.name, 5)
    with pytest.raises(BadData, match="give one of them, such as step-000005"):
        chosen_checkpoint(tmp_path, str(tmp_path / "other"))
    (tmp_path / "empty").mkdir()
    with pytest.raises(BadData, match=r"there is no manifest\.json"):
        chosen_checkpoint(tmp_path, str(tmp_path / "empty"))
    damage(saved(tmp_path, 7).folder)
    with pytest.raises(BadData, match="its bytes have changed"):
        chosen_checkpoint(tmp_path, str(tmp_path / "step-000007"))


def test_a_path_is_taken_where_nothing_newer_would_be_lost(tmp_path):
    run, other = tmp_path / "run" / "checkpoints", tmp_path / "other" / "checkpoints"
    for step in (5, 6):
        saved(run, step)
    newest = chosen_checkpoint(run, str(step_folder(run, 6)))
    branch = chosen_checkpoint(other, str(step_folder(run, 5)))
    assert newest is not None and newest.step == 6
    assert branch is not None and branch.folder == step_folder(run, 5)

    with pytest.raises(CannotWrite) as caught:
        chosen_checkpoint(run, str(step_folder(run, 5)))
    assert "holds newer step 6, which would be lost" in str(caught.value)
    assert "use another `name`, move it away, or leave --resume out" in str(caught.value)

    saved(other, 7)  # what the branch has made by now
    with pytest.raises(CannotWrite, match="holds step 7 of this run, which would be lost"):
        chosen_checkpoint(other, str(step_folder(run, 5)))
    assert steps_on_disk(run) == [6, 5] and steps_on_disk(other) == [7]
