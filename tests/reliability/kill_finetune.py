"""Kill a finetune at random moments of its life and run it again until it is done.

    python -m tests.reliability.kill_finetune STAGE KILLS SEED STEPS [SECONDS]

Half of the kills wait for a save or a preview, which are short, a third for a random step, the
rest fall into the start. After so many seconds nothing more is killed. Prints one JSON document;
what happens meanwhile goes to stderr. Every random thing of a run is on: LoRA with dropout,
captions that are dropped, data read by threads, average, clipping, gradient checkpointing,
accumulation, previews.
"""

import json
import math
import random
import sys
import tempfile
import time
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tests.reliability.finetune_ranks import (
    KILLED,
    Group,
    differences,
    get_ready,
    outcome,
    resumed_from,
    words_for,
)
from tests.stages.small_run import LORA, another_run, build

WORLD, EVERY = 2, 5
EVERYTHING = [
    *LORA,
    "finetune.batch=4",
    "finetune.micro_batch=1",
    "finetune.loss.perceptual=null",
    f"finetune.checkpoint.every={EVERY}",
    "finetune.preview={every: 10, prompts: [a red disc], steps: 2, guidance: 1.0}",
]
FAR = 12  # steps after the last checkpoint, at most: several kills fit in a run
PEERS_END_WITHIN = 90.0  # seconds; the recipe's own timeout is 60


@dataclass
class Tally:
    """What became of the kills."""

    kills: int = 0
    rounds: int = 0  # runs from nothing to the end
    equal_rounds: int = 0
    moments: Counter[str] = field(default_factory=Counter)
    victims: Counter[str] = field(default_factory=Counter)
    kills_by_round: list[int] = field(default_factory=list)
    kills_in_equal_rounds: int = 0
    steps_repeated: int = 0
    slowest_peer: float = 0.0  # seconds that the rank which was not killed lived on
    peers: Counter[str] = field(default_factory=Counter)  # how it ended
    problems: list[str] = field(default_factory=list)


class Hunt:
    """One folder with a lifted model and shards, a run that nobody disturbed, and the dice."""

    def __init__(self, folder: Path, stage: int, seed: int, *, steps: int, seconds: float) -> None:
        self.folder, self.stage, self.until = folder, stage, time.monotonic() + seconds
        self.recipe = build(folder)
        self.dice, self.tally = random.Random(seed), Tally()
        self.settings = [*EVERYTHING, f"finetune.zero.stage={stage}", f"finetune.steps={steps}"]
        self.steps = steps
        self.lengths = {"a step": 0.1, "a save": 0.03, "a preview": 0.1}  # how late it may be
        begun = time.monotonic()
        group = self.begin("whole")
        while not steps_taken(folder / "whole") and not group.ended():
            time.sleep(0.001)
        self.lengths["the start"] = time.monotonic() - begun
        codes = group.wait()
        assert codes == [0] * WORLD, [group.said(rank) for rank in range(WORLD)]
        self.whole = outcome(folder / "whole", steps)
        report(f"stage {stage}: the whole run took {time.monotonic() - begun:.1f} s")

    def begin(self, name: str) -> Group:
        words = words_for(self.recipe, [another_run(self.recipe, name), *self.settings])
        return Group(words, WORLD, self.folder / "said" / name)

    def goes_on(self, kills: int) -> bool:
        return self.tally.kills < kills and time.monotonic() < self.until

    def hunt(self, kills: int) -> Tally:
        while self.goes_on(kills):
            self.round(kills)
        return self.tally

    def round(self, kills: int) -> None:
        """One run from nothing to the end, killed on its way as long as there are kills left."""
        name, before = f"hunted-{self.tally.rounds}", self.tally.kills
        run = self.folder / name
        self.tally.rounds += 1
        while True:
            newest = newest_step(run)
            group = self.begin(name)
            if newest < self.steps and self.goes_on(kills) and self.kill(group, run, newest):
                self.check_resumed(group, newest)
                continue
            codes = group.wait()
            self.check_resumed(group, newest)
            if codes != [0] * WORLD:
                self.problem(f"{name}: ended with {codes}: {group.said()[-300:]}")
                return
            break
        found = differences(self.whole, outcome(run, self.steps))
        self.tally.problems += [f"{name}: {text}" for text in found]
        if not found:
            self.tally.equal_rounds += 1
            self.tally.kills_in_equal_rounds += self.tally.kills - before
        self.tally.kills_by_round.append(self.tally.kills - before)
        report(
            f"stage {self.stage}: {name} was killed {self.tally.kills - before} times and is "
            f"{found or 'equal'}; {self.tally.kills} of {kills} kills"
        )

    def kill(self, group: Group, run: Path, newest: int) -> bool:
        """Kill one rank or all at a moment of this life; False if it ended before."""
        aim = self.dice.choice(["the start", "a step", "a step", "a save", "a save", "a preview"])
        step = newest + self.dice.randint(1, min(FAR, self.steps - newest)) - 1
        late = self.dice.random()
        victims: list[int] = self.dice.choice([[0], [1], [0, 1]])
        while aim != "the start" and not (has_begun(group) and reached(aim, run, step)):
            if group.ended():
                return False
            time.sleep(0.001)
        time.sleep(late * self.lengths[aim])
        for rank in victims:
            group.signal(rank, 9)
        killed = time.monotonic()
        phase = phase_of(run) if has_begun(group) and steps_taken(run) > newest else "the start"
        codes = group.wait(PEERS_END_WITHIN)
        if not all(codes[rank] == KILLED for rank in victims):
            return False  # it had just ended
        self.tally.kills += 1
        self.tally.moments[phase] += 1
        self.tally.victims["all ranks" if len(victims) == WORLD else f"rank {victims[0]}"] += 1
        if len(victims) < WORLD:
            code = codes[1 - victims[0]]
            self.tally.peers[f"exit {code}" if code is not None else "hung"] += 1
            self.tally.slowest_peer = max(self.tally.slowest_peer, time.monotonic() - killed)
            if code is None:
                self.problem(f"the other rank hung for {PEERS_END_WITHIN:.0f} s after a kill")
        self.tally.steps_repeated += max(0, steps_taken(run) - newest_step(run))
        return True

    def check_resumed(self, group: Group, newest: int) -> None:
        """It must go on from the newest checkpoint that was committed, not from an older one."""
        began = resumed_from(group.said())
        if has_begun(group) and began != newest:
            self.problem(f"went on from step {began}, committed was {newest}")

    def problem(self, text: str) -> None:
        self.tally.problems.append(text)
        report(f"stage {self.stage}: PROBLEM: {text}")


def newest_step(run: Path) -> int:
    """The newest checkpoint that has been committed; 0 if there is none."""
    return max((int(path.name[5:]) for path in (run / "checkpoints").glob("step-*")), default=0)


def steps_taken(run: Path) -> int:
    """The step of the last whole line of metrics.jsonl."""
    path = run / "metrics.jsonl"
    lines = path.read_bytes().split(b"\n")[:-1] if path.exists() else []
    return int(json.loads(lines[-1])["step"]) if lines else 0


def being_saved(run: Path) -> bool:
    return any((run / "checkpoints").glob(".[wr]*"))


def being_shown(run: Path) -> bool:
    """Whether a preview is under way: its step is saved, its last file is missing."""
    step, samples = newest_step(run), run / "samples"
    drawn = step % 10 == 0 and step > 0 and steps_taken(run) == step
    return drawn and not (samples / f"step-{step:06d}" / "grid.png").exists()


def reached(aim: str, run: Path, step: int) -> bool:
    if aim == "a preview":
        return being_shown(run)
    return steps_taken(run) >= step and (aim == "a step" or being_saved(run))


def has_begun(group: Group) -> bool:
    """Whether the state is restored, so that what is on disk is of this life."""
    return "parameters train" in group.said()


def phase_of(run: Path) -> str:
    if being_saved(run):
        return "a save"
    return "a preview" if being_shown(run) else "a step"


def report(text: str) -> None:
    print(f"{time.strftime('%H:%M:%S')} {text}", file=sys.stderr, flush=True)


def hunt(stage: int, kills: int, seed: int, *, steps: int, seconds: float) -> dict[str, Any]:
    with tempfile.TemporaryDirectory() as name:
        tally = Hunt(Path(name), stage, seed, steps=steps, seconds=seconds).hunt(kills)
    return {
        "stage": stage,
        "ranks": WORLD,
        "steps": steps,
        "seed": seed,
        "kills": tally.kills,
        "kills after which the run ended equal": tally.kills_in_equal_rounds,
        "runs": tally.rounds,
        "runs that ended equal": tally.equal_rounds,
        "kills in each run": tally.kills_by_round,
        "killed during": dict(tally.moments),
        "victims": dict(tally.victims),
        "how the other rank ended": dict(tally.peers),
        "seconds until it had, at most": round(tally.slowest_peer, 1),
        "steps taken again": tally.steps_repeated,
        "problems": tally.problems,
    }


def main() -> None:
    stage, kills, seed, steps, *limit = (int(word) for word in sys.argv[1:])
    seconds = limit[0] if limit else math.inf
    get_ready()
    print(json.dumps(hunt(stage, kills, seed, steps=steps, seconds=seconds)))


if __name__ == "__main__":
    main()
