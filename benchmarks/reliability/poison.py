"""NaN and infinity in one micro-batch of one of two ranks, at every ZeRO stage.

    python -m benchmarks.reliability.poison        # minutes

In the loss, in the input and in one gradient. The update has to be left out on both ranks, no
number in any checkpoint may be other than finite, weights, moments and averages have to be those
of before, the samples named, and the run has to go on. Writes benchmarks/results/poison.json.
"""

import json
import tempfile
import time
from pathlib import Path

from asymlift.artifacts.checkpoint import steps_on_disk
from tests.reliability.poison import KINDS, poison
from tests.reliability.poisoned_runs import job, problems_of
from tests.stages.small_run import another_run, build

RESULTS = Path(__file__).parents[1] / "results" / "poison.json"


def main() -> None:
    started = time.monotonic()
    with tempfile.TemporaryDirectory() as name:
        recipe = build(Path(name) / "runs")
        places = [(kind, value) for kind in KINDS for value in ("nan", "inf")]
        runs: dict[str, list[str]] = {}
        for stage in range(4):
            jobs = [job(recipe, stage, kind, value) for kind, value in places]
            codes, said = poison(recipe, jobs)
            for one in jobs:
                folder = recipe.parent / one["name"]
                whole = len(steps_on_disk(folder / "checkpoints")) == 4
                runs[one["name"]] = problems_of(folder) if whole else [str(codes), *said]
                print(one["name"], runs[one["name"]] or "as it should be", flush=True)
        endless = job(recipe, 1, "loss", "nan", steps=list(range(1, 9)))
        name = another_run(recipe, "endless")
        more = ["finetune.max_skipped=3", "finetune.steps=8"]
        endless["overrides"] = [name, *endless["overrides"][1:], *more]
        codes, said = poison(recipe, [endless])
    results = {
        "runs": len(runs),
        "as they should be": sum(not found for found in runs.values()),
        "problems": {name: found for name, found in runs.items() if found},
        "three in a row, max_skipped 3": {"exit codes": codes, "said": said[0].splitlines()[-2:]},
        "seconds": round(time.monotonic() - started),
    }
    print(json.dumps(results, indent=2))
    RESULTS.write_text(json.dumps(results, indent=2) + "\n")


if __name__ == "__main__":
    main()
