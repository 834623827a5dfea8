"""A micro-batch of NaN on one rank: the update is left out everywhere, named, and the run goes on.

One start of two processes; benchmarks/reliability/poison.py does the same at every ZeRO stage.
"""

import json

import pytest

from asymlift.artifacts.checkpoint import steps_on_disk
from asymlift.errors import Exit
from asymlift.stages.verify import verify
from tests.reliability.poison import poison
from tests.reliability.poisoned_runs import job, problems_of
from tests.stages.small_run import build


@pytest.fixture(scope="module")
def ended(tmp_path_factory):
    """(folder above the runs, exit codes, what the ranks said)"""
    recipe = build(tmp_path_factory.mktemp("runs"))
    last = job(recipe, 2, "loss", "inf", steps=[1, 2, 3])
    last["overrides"].append("finetune.max_skipped=2")
    jobs = [job(recipe, 0, "gradient", "inf"), job(recipe, 3, "input", "nan"), last]
    return recipe.parent, *poison(recipe, jobs)


@pytest.mark.parametrize("name", ["poison-0-gradient-inf", "poison-3-input-nan"])
def test_one_poisoned_micro_batch_costs_one_update(ended, name):
    folder, codes, said = ended
    assert codes == [Exit.BAD_DATA] * 2, said  # by the last job
    assert problems_of(folder / name) == []
    assert "the update was left out" in said[0]


def test_too_many_in_a_row_end_all_ranks_with_the_samples_written_down(ended):
    folder, codes, said = ended
    run = folder / "poison-2-loss-inf"
    entries = [json.loads(line) for line in (run / "logs/not-finite.jsonl").open()]

    assert codes == [Exit.BAD_DATA] * 2
    assert all("2 updates in a row were not finite" in text for text in said)
    assert [(entry["step"], len(entry["keys"])) for entry in entries] == [(2, 8), (3, 8)]
    assert steps_on_disk(run / "checkpoints") == [2, 1]
    assert verify(run / "checkpoints/step-000002").ok
