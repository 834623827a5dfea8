"""Kill convert at every file operation, and say what was left; run under the injector.

After each kill the target must be absent, or the complete old folder, or the complete new one, and
a second run must end in the same bytes as a run that nobody disturbed.
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
from asymlift.stages.convert import ConvertPlan, convert
from tests.reliability.fake_pipeline import fake_plan, snapshot
from tests.reliability.injector import Injector, quick_folder


class Experiment:
    """One plan, and the two folders that its target may hold."""

    def __init__(self, folder: Path, *, over_old: bool) -> None:
        self.run = folder / "run"
        # Into an empty place go two networks, each with maps of its own.
        self.plan: ConvertPlan = fake_plan(folder, seed=0, second=not over_old, overwrite=over_old)
        convert(self.plan)
        self.new = snapshot(self.plan.output)
        shutil.rmtree(self.run)
        self.kept: Path | None = None
        self.resumed = 0  # weight files that second runs did not have to write again
        if over_old:
            convert(fake_plan(folder, seed=1))
            self.kept = self.run.rename(folder / "old-run")
        self.old = snapshot(self.kept / "lifted") if self.kept else None

    def reset(self) -> None:
        shutil.rmtree(self.run, ignore_errors=True)
        if self.kept:
            shutil.copytree(self.kept, self.run)
        else:
            self.run.mkdir()

    def work(self) -> int:
        try:
            convert(self.plan)
        except UserError as error:
            (self.run.parent / "error").write_text(str(error))
            return int(error.exit)
        return 0

    def state(self) -> str:
        """What a reader finds: absent, old, new, or neither, which must never be."""
        if not self.plan.output.exists():
            return "absent"
        found = snapshot(self.plan.output)
        if found == self.new:
            return "new"
        return "old" if found == self.old else "neither"

    def finish(self) -> str:
        """Run again, undisturbed; '' if all is as it should be."""
        self.resumed += convert(self.plan).resumed
        assert not check_manifest(self.plan.output)
        if self.state() != "new":
            return "the second run ended in other bytes"
        left = sorted(path.name for path in self.run.iterdir())
        return "" if left == ["lifted"] else f"left behind: {left}"


def kill_everywhere(folder: Path, *, over_old: bool) -> dict[str, Any]:
    """Every operation in turn."""
    injector, experiment = Injector(), Experiment(folder, over_old=over_old)
    experiment.reset()
    points = injector.count(experiment.run, experiment.work)
    states: Counter[str] = Counter()
    problems = []
    for point in range(1, points + 1):
        experiment.reset()
        code = injector.kill(point, experiment.run, experiment.work)
        states[experiment.state()] += 1
        problem = experiment.finish() if code is None else f"not killed, exit {code}"
        if problem:
            problems.append(f"operation {point}: {problem}")
    return {
        "points": points,
        "states": dict(states),
        "weight files kept by second runs": experiment.resumed,
        "problems": problems,
    }


def kill_twice(folder: Path, *, over_old: bool, times: int) -> dict[str, Any]:
    """A random kill, then another of the second run; the third must succeed."""
    injector, experiment = Injector(), Experiment(folder, over_old=over_old)
    experiment.reset()
    points = injector.count(experiment.run, experiment.work)
    dice = torch.Generator().manual_seed(0)
    states: Counter[str] = Counter()
    problems = []
    for _ in range(times):
        experiment.reset()
        first, second = torch.randint(1, points + 1, (2,), generator=dice).tolist()
        for point in (first, second):
            injector.kill(point, experiment.run, experiment.work)
            states[experiment.state()] += 1
        if problem := experiment.finish():
            problems.append(f"operations {first}, {second}: {problem}")
    return {"pairs": times, "states": dict(states), "problems": problems}


def kill_naive(folder: Path, *, over_old: bool) -> dict[str, Any]:
    """What this is worth: a writer that puts the same files straight into the target."""
    injector, experiment = Injector(), Experiment(folder, over_old=over_old)

    def write_in_place() -> int:
        for name, data in experiment.new.items():
            path = experiment.plan.output / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(data)
        return 0

    experiment.reset()
    points = injector.count(experiment.run, write_in_place)
    states: Counter[str] = Counter()
    for point in range(1, points + 1):
        experiment.reset()
        injector.kill(point, experiment.run, write_in_place)
        states[experiment.state()] += 1
    return {"points": points, "states": dict(states)}


def fill_disk(folder: Path, *, at: list[int], over_old: bool) -> list[dict[str, Any]]:
    """A disk that is full from the n-th write on, then one with space again."""
    injector, experiment = Injector(), Experiment(folder, over_old=over_old)
    found = []
    for write in at:
        experiment.reset()
        code = injector.fill(write, experiment.run, experiment.work)
        message = (experiment.run.parent / "error").read_text()
        found.append(
            {"exit": code, "message": message, "state": experiment.state()}
            | {"problem": experiment.finish() if code else ""}
        )
    return found


def main() -> None:
    torch.set_num_threads(1)
    scenario, over_old, *rest = sys.argv[1:]
    with quick_folder() as name:
        folder, old = Path(name), over_old == "old"
        result: Any
        if scenario == "everywhere":
            result = kill_everywhere(folder, over_old=old)
        elif scenario == "naive":
            result = kill_naive(folder, over_old=old)
        elif scenario == "twice":
            result = kill_twice(folder, over_old=old, times=int(rest[0]))
        else:
            result = fill_disk(folder, at=[int(n) for n in rest], over_old=old)
    os.write(1, json.dumps(result).encode())


if __name__ == "__main__":
    main()
