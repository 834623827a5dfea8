"""Kill prepare at many file operations, and say what was left; run under the injector.

After each kill a second run must end in the same bytes as a run that nobody disturbed, and must
leave alone every shard that was finished before.
"""

import json
import os
import shutil
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import torch

from asymlift.artifacts.manifest import check_manifest
from asymlift.errors import UserError
from asymlift.stages.prepare.finish import whole
from asymlift.stages.prepare.job import Job
from asymlift.stages.prepare.run import Share, prepare
from asymlift.stages.verbs import prepare_job
from tests.reliability.injector import Injector, quick_folder
from tests.stages.prepare.small_prepare import content, make_folder, recipe_for, shards

NUM_PICTURES = 20  # in three shards
ALONE = Share()


class Experiment:
    """One recipe, and what its folder must hold in the end."""

    def __init__(self, folder: Path, *, tasks: int = 1) -> None:
        source = make_folder(folder / "source", NUM_PICTURES)
        (source / "broken.png").write_bytes(b"broken")
        self.run, self.tasks = folder / "run", tasks
        self.recipe = recipe_for(self.run, source, data={"resize": {"sides": [32]}, "workers": 0})
        self.reset()
        job = prepare_job(self.recipe)
        self.encoders = job.encoders
        prepare(job, ALONE, overwrite=False)
        self.wanted = content(job.out)
        self.kept = 0  # shards that second runs did not have to make again

    def job(self) -> Job:
        """A fresh one, as a new process has; only the encoders are loaded already."""
        job = prepare_job(self.recipe)
        job.encoders.__dict__.update(self.encoders.__dict__)
        return job

    def reset(self) -> None:
        shutil.rmtree(self.run, ignore_errors=True)
        self.run.mkdir()

    def work(self) -> int:
        try:
            for number in range(self.tasks):
                prepare(self.job(), Share(number, self.tasks), overwrite=False)
        except UserError as error:
            (self.run.parent / "error").write_text(str(error))
            return int(error.exit)
        return 0

    def finish(self) -> str:
        """Run again, undisturbed; '' if all is as it should be."""
        out = self.run / "out"
        there = shards(out) if out.exists() else []
        before = {p: p.stat() for p in there if whole(p, self.job().made)}
        complete = prepare(self.job(), ALONE, overwrite=False).complete
        if not complete or content(out) != self.wanted or check_manifest(out):
            return "the second run ended in other bytes"
        for path, old in before.items():
            new = path.stat()
            if (new.st_ino, new.st_mtime_ns) != (old.st_ino, old.st_mtime_ns):
                return f"{path.name} was made again"
        self.kept += len(before)
        left = sorted(path.name for path in self.run.iterdir())
        return "" if left == ["out"] else f"left behind: {left}"


def kill_often(folder: Path, *, every: int, tasks: int) -> dict[str, Any]:
    """Every so manyth operation in turn."""
    injector, experiment = Injector(), Experiment(folder, tasks=tasks)
    experiment.reset()
    points = injector.count(experiment.run, experiment.work)
    killed, problems = 0, []
    for point in range(1, points + 1, every):
        experiment.reset()
        code = injector.kill(point, experiment.run, experiment.work)
        killed += code is None
        problem = experiment.finish() if code is None else f"not killed, exit {code}"
        if problem:
            problems.append(f"operation {point}: {problem}")
    return {
        "points": points,
        "killed": killed,
        "shards kept": experiment.kept,
        "problems": problems,
    }


def kill_twice(folder: Path, *, times: int) -> dict[str, Any]:
    """A random kill, then another of the second run; the third must succeed."""
    injector, experiment = Injector(), Experiment(folder)
    experiment.reset()
    points = injector.count(experiment.run, experiment.work)
    dice = torch.Generator().manual_seed(0)
    codes: Counter[str] = Counter()
    problems = []
    for _ in range(times):
        experiment.reset()
        first, second = torch.randint(1, points + 1, (2,), generator=dice).tolist()
        for point in (first, second):
            codes[str(injector.kill(point, experiment.run, experiment.work))] += 1
        if problem := experiment.finish():
            problems.append(f"operations {first}, {second}: {problem}")
    return {"codes": dict(codes), "problems": problems}


def fill_disk(folder: Path, *, at: list[int]) -> list[dict[str, Any]]:
    """A disk that is full from the n-th write on, then one with space again."""
    injector, experiment = Injector(), Experiment(folder)
    found = []
    for write in at:
        experiment.reset()
        code = injector.fill(write, experiment.run, experiment.work)
        message = (experiment.run.parent / "error").read_text()
        found.append({"exit": code, "message": message, "problem": experiment.finish()})
    return found


def main() -> None:
    torch.set_num_threads(1)
    scenario, *numbers = sys.argv[1:]
    with quick_folder() as name:
        folder, given = Path(name), [int(number) for number in numbers]
        result: Any
        if scenario == "often":
            result = kill_often(folder, every=given[0], tasks=given[1])
        elif scenario == "twice":
            result = kill_twice(folder, times=given[0])
        else:
            result = fill_disk(folder, at=given)
    os.write(1, json.dumps(result).encode())


if __name__ == "__main__":
    main()
