"""Kill a finetune at the file operations of its saves, and fill its disk; run under the injector.

    python -m tests.reliability.kill_saves WORLD STAGE WHAT ...

    kill:VICTIM:EVERY:FIRST[:LAST]   at every EVERY-th operation of two saves
    twice:TIMES:SEED                 a kill, and another of the run that goes on
    fill:N:N...                      the disk is full from the N-th write on
    once:N:N...                      it is full for that one write

Rank 0 alone writes. VICTIM 1 dies while rank 0 stands at that operation. The run has a committed
step 2, saves steps 3 and 4, and each save removes the one before. Prints one JSON list.
"""

import ctypes
import json
import os
import random
import shutil
import sys
from collections import Counter
from collections.abc import Callable
from itertools import count
from pathlib import Path
from typing import Any

from asymlift.artifacts.manifest import check_manifest
from tests.reliability.finetune_ranks import (
    KILLED,
    Group,
    differences,
    get_ready,
    outcome,
    resumed_from,
    words_for,
)
from tests.reliability.injector import quick_folder
from tests.reliability.kill_finetune import newest_step, report
from tests.stages.small_run import LORA, another_run, build

BEFORE, STEPS = 2, 4
QUICK = [
    *LORA,
    "finetune.train={lora: {rank: 2, alpha: 4, dropout: 0.1, targets: [time_guidance_embed."
    "timestep_embedder.linear_1]}, modules: [first, last]}",
    "finetune.batch=2",
    "finetune.micro_batch=1",
    "finetune.loss.perceptual=null",
    "finetune.checkpoint={every: 1, keep: 1, milestone: null}",
]
Arm = Callable[[Any, str, dict[int, int]], None]


class Saves:
    """A run with a committed step, of which every experiment gets a copy."""

    def __init__(self, folder: Path, world: int, stage: int) -> None:
        self.folder, self.world = folder, world
        self.recipe, self.run = build(folder), folder / "hunted"
        self.settings = [*QUICK, f"finetune.zero.stage={stage}"]
        self.finish("start", [f"finetune.steps={BEFORE}"])
        self.finish("whole", [f"finetune.steps={STEPS}"])
        self.whole = outcome(folder / "whole", STEPS)
        self.seconds = 0.0

    def begin(self, name: str, more: list[str], arm: Arm | None = None) -> Group:
        def first(rank: int, pids: dict[int, int]) -> None:
            if rank == 0 and arm is not None:
                arm(ctypes.CDLL(None), str(self.folder / name / "checkpoints"), pids)

        words = words_for(self.recipe, [another_run(self.recipe, name), *self.settings, *more])
        return Group(words, self.world, self.folder / "said", first=first)

    def finish(self, name: str, more: list[str]) -> str:
        group = self.begin(name, more)
        codes = group.wait()
        assert codes == [0] * self.world, group.said()
        return group.said()

    def reset(self) -> None:
        shutil.rmtree(self.run, ignore_errors=True)
        shutil.copytree(self.folder / "start", self.run, symlinks=True)

    def disturbed(self, arm: Arm) -> tuple[list[int | None], str]:
        """The run, with the injector armed; exit codes, and what rank 0 said."""
        group = self.begin("hunted", [f"finetune.steps={STEPS}"], arm)
        return group.wait(), group.said()

    def newest(self) -> int:
        """The newest committed step, which has to be whole whatever happened."""
        step = newest_step(self.run)
        problems = check_manifest(self.run / "checkpoints" / f"step-{step:06d}")
        assert not problems, problems
        return step

    def goes_on(self) -> list[str]:
        """Run the same command again, undisturbed: what is not as it should be."""
        newest = self.newest()
        group = self.begin("hunted", [f"finetune.steps={STEPS}"])
        codes = group.wait()
        if codes != [0] * self.world:
            return [f"the second run ended with {codes}: {group.said()[-400:]}"]
        problems = differences(self.whole, outcome(self.run, STEPS))
        if newest < STEPS and resumed_from(group.said()) != newest:
            problems.append(f"went on from {resumed_from(group.said())}, committed was {newest}")
        left = {path.name for path in (self.run / "checkpoints").iterdir()}
        # Killed after the last commit, the one before stays: a run that is done deletes nothing.
        kept = {f"step-{step:06d}" for step in (STEPS, *([STEPS - 1] if newest == STEPS else []))}
        if not {f"step-{STEPS:06d}"} <= left <= kept:
            problems.append(f"left behind: {sorted(left)}")
        return problems


def kill_at(point: int, victim: int = 0) -> Arm:
    def arm(library: Any, folder: str, pids: dict[int, int]) -> None:
        library.killfs_arm(ctypes.c_long(point), folder.encode())
        library.killfs_victim(ctypes.c_long(pids.get(victim, 0)))

    return arm


def full_from(write: int, writes: int = 0) -> Arm:
    """Full from that write on; with `writes`, until so many were refused."""

    def arm(library: Any, folder: str, pids: dict[int, int]) -> None:
        library.killfs_fill(ctypes.c_long(write), folder.encode())
        library.killfs_drain(ctypes.c_long(writes))

    return arm


def kill_everywhere(
    saves: Saves, *, victim: int, every: int, first: int, last: int | None
) -> dict[str, Any]:
    newest: Counter[str] = Counter()
    problems, killed = [], 0
    for point in count(first, every):
        if last is not None and point > last:
            break
        saves.reset()
        codes, said = saves.disturbed(kill_at(point, victim))
        if codes == [0] * saves.world and last is None:
            break  # there is no such operation any more
        killed += codes[victim] == KILLED
        if codes[victim] != KILLED or None in codes:
            problems.append(f"operation {point}: ended with {codes}: {said[-600:]}")
        newest[f"step {saves.newest()}"] += 1
        problems += [f"operation {point}: {text}" for text in saves.goes_on()]
        if killed % 10 == 0:
            report(f"rank {victim}: {killed} kills, {len(problems)} problems")
    return {
        "ranks": saves.world,
        "rank killed": victim,
        "operations of two saves, at most": point - 1 if last is None else None,
        "every": every,
        "killed": killed,
        "newest committed then": dict(newest),
        "problems": problems,
    }


def kill_twice(saves: Saves, *, times: int, seed: int) -> dict[str, Any]:
    """The run that goes on clears away what the first left, and is killed at that too."""
    dice, problems = random.Random(seed), []
    for number in range(times):
        saves.reset()
        points = dice.randint(1, 40), dice.choice([dice.randint(1, 8), dice.randint(1, 60)])
        for point in points:
            saves.disturbed(kill_at(point))
        problems += [f"operations {points}: {text}" for text in saves.goes_on()]
        report(f"killed twice: {number + 1} of {times}, {len(problems)} problems")
    return {"ranks": saves.world, "pairs": times, "seed": seed, "problems": problems}


def fill_disk(saves: Saves, *, at: list[int], writes: int = 0) -> list[dict[str, Any]]:
    """A disk that is full from the n-th write on, then one with space again."""
    found = []
    for write in at:
        saves.reset()
        codes, said = saves.disturbed(full_from(write, writes))
        found.append(
            {
                "write": write,
                "exits": codes,
                "message": said[-1000:],
                "newest committed": saves.newest(),
                "problems": saves.goes_on(),
            }
        )
        report(f"disk full from write {write}: exits {codes}, {found[-1]['problems']}")
    return found


def experiment(saves: Saves, what: str) -> Any:
    scenario, *words = what.split(":")
    numbers = [int(word) for word in words]
    if scenario == "kill":
        victim, every, first, *end = numbers
        last = end[0] if end else None
        return kill_everywhere(saves, victim=victim, every=every, first=first, last=last)
    if scenario == "twice":
        return kill_twice(saves, times=numbers[0], seed=numbers[1])
    assert scenario in ("fill", "once"), scenario
    return fill_disk(saves, at=numbers, writes=int(scenario == "once"))


def main() -> None:
    world, stage, *experiments = sys.argv[1:]
    get_ready()
    with quick_folder() as name:
        saves = Saves(Path(name), int(world), int(stage))
        found = [experiment(saves, what) for what in experiments]
    os.write(1, json.dumps(found).encode())


if __name__ == "__main__":
    main()
