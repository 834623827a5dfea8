"""Out of memory: what was held by its parts, and what to change."""

import pytest
import torch

from asymlift.errors import Unavailable
from asymlift.runtime import watch
from asymlift.runtime.launch import Ranks
from asymlift.stages.finetune import run as finetune_run
from asymlift.stages.finetune.memory import advice, explaining_memory
from tests.stages.small_run import build, small_recipe

HELD = {"frozen weights": 3 << 30, "trained weights": 0, "optimizer state": 5 << 20}


def test_running_out_of_memory_says_what_was_held_and_what_to_change(tmp_path):
    watch.at(7, "computing gradients", "from 000003 on")

    with (
        pytest.raises(Unavailable) as caught,
        explaining_memory(small_recipe(tmp_path), Ranks(1, 2, 1), lambda: HELD),
    ):
        torch.empty(1 << 60)

    first, second, third = str(caught.value).splitlines()
    assert first.startswith("rank 1 (")
    assert "ran out of memory at step 7 while computing gradients (from 000003 on): " in first
    assert second.endswith(
        "Of it frozen weights 3.0 GiB, optimizer state 5.0 MiB; the rest passes."
    )
    assert third.count("--set ") == 3


@pytest.mark.parametrize(
    ("part", "phase"),
    [("Engine", "starting the engine"), ("build_step", "loading the model")],
)
def test_memory_that_ends_before_the_first_step_is_explained_too(
    tmp_path, monkeypatch, part, phase
):
    build(tmp_path)
    monkeypatch.setattr(finetune_run, part, lambda *_: torch.empty(1 << 60))
    with pytest.raises(Unavailable) as caught:
        finetune_run.finetune(small_recipe(tmp_path), Ranks(0, 1, 0))
    assert f"ran out of memory while {phase}: " in str(caught.value)
    assert ". Cheapest changes: --set " in str(caught.value).splitlines()[1]


def test_what_to_change_begins_with_what_costs_least(tmp_path):
    recipe = small_recipe(tmp_path)
    assert advice(recipe, 2, "computing gradients").startswith(
        "Cheapest changes: --set finetune.ema.shard=always (costs nothing); --set finetune.micro_"
    )
    assert "--set sample.batch=2 (costs nothing)" in advice(recipe, 1, "drawing previews")


def test_what_is_not_about_memory_stays_what_it_is(tmp_path):
    with (
        pytest.raises(ZeroDivisionError),
        explaining_memory(small_recipe(tmp_path), Ranks(0, 1, 0), lambda: HELD),
    ):
        1 // 0
