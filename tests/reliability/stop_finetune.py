"""Ask one rank of a finetune to stop, at random moments, and run it again until it is done.

    python -m tests.reliability.stop_finetune ask STAGE TIMES SEED STEPS
    python -m tests.reliability.stop_finetune torchrun

`ask` takes turns with SIGTERM, SIGUSR1, a `save_quit` file and Ctrl-C, each to a random rank.
`torchrun` does it once with SIGTERM and once with SIGUSR1, both sent to torchrun itself. Prints
one JSON document.
"""

import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from tests.reliability.finetune_ranks import (
    ROOT,
    Group,
    differences,
    environment,
    free_port,
    get_ready,
    outcome,
    resumed_from,
    words_for,
)
from tests.reliability.kill_finetune import EVERYTHING, newest_step, report, steps_taken
from tests.stages.small_run import another_run, build

WORLD = 2
WAYS = ("SIGTERM", "SIGUSR1", "save_quit", "SIGINT")
RARELY = "finetune.checkpoint.every=1000"  # what is saved was saved because somebody asked


class Stops:
    """A run, the same run whole, and what was seen when it was asked to stop."""

    def __init__(self, folder: Path, stage: int, steps: int) -> None:
        self.folder, self.steps = folder, steps
        self.recipe, self.run = build(folder), folder / "asked"
        self.settings = [
            *EVERYTHING,
            RARELY,
            f"finetune.zero.stage={stage}",
            f"finetune.steps={steps}",
        ]
        group = self.begin("whole")
        assert group.wait() == [0] * WORLD, group.said()
        self.whole = outcome(folder / "whole", steps)
        self.stops: list[dict[str, Any]] = []
        self.problems: list[str] = []
        self.repeated = 0  # steps that had been taken before a stop, and were again

    def words(self, name: str) -> list[str]:
        return words_for(self.recipe, [another_run(self.recipe, name), *self.settings])

    def begin(self, name: str) -> Group:
        return Group(self.words(name), WORLD, self.folder / "said" / name)

    def stop(self, way: str, rank: int, after: int, late: float) -> None:
        """Ask `late` seconds after so many more steps; the next start must take the next step."""
        before, group = steps_taken(self.run), self.begin("asked")
        while steps_taken(self.run) < before + after and not group.ended():
            time.sleep(0.001)
        self.goes_on_from(before, group)
        time.sleep(late)
        asked_at, asked = steps_taken(self.run), time.monotonic()
        if way == "save_quit":
            (self.run / way).touch()
        else:
            group.signal(rank, getattr(signal, way))
        codes = group.wait()
        stopped_at, saved = steps_taken(self.run), newest_step(self.run)
        stop = {
            "way": way,
            "rank": rank,
            "seconds to the end": round(time.monotonic() - asked, 2),
            "asked in step": asked_at + 1,
            "stopped after step": stopped_at,
            "exit codes": codes,
        }
        self.stops.append(stop)
        report(f"{stop}")
        self.expect(saved, stopped_at, "saved")
        self.expect(codes, expected_codes(way, rank), "ended with")
        if stopped_at > asked_at + 2:
            self.problems.append(f"{stopped_at - asked_at} steps after it was asked: {stop}")

    def expect(self, found: Any, wanted: Any, what: str) -> None:
        if found != wanted:
            self.problems.append(f"stop {len(self.stops)}: {what} {found}, not {wanted}")

    def goes_on_from(self, taken: int, group: Group) -> None:
        self.expect(resumed_from(group.said()), taken, "went on from")
        self.repeated += taken - resumed_from(group.said())

    def finish(self) -> None:
        before, group = steps_taken(self.run), self.begin("asked")
        self.expect(group.wait(), [0] * WORLD, "the last start ended with")
        self.goes_on_from(before, group)
        self.problems += differences(self.whole, outcome(self.run, self.steps))

    def found(self) -> dict[str, Any]:
        return {
            "ranks": WORLD,
            "steps": self.steps,
            "stops": len(self.stops),
            "steps taken again": self.repeated,
            "seconds from the request to the end, at most": max(
                (stop["seconds to the end"] for stop in self.stops), default=0
            ),
            "ends equal to the whole run": not self.problems,
            "problems": self.problems,
            "each": self.stops,
        }


def expected_codes(way: str, rank: int) -> list[int]:
    """75 means that the same command goes on; Ctrl-C is told to whoever typed it."""
    return [130 if way == "SIGINT" and at == rank else 75 for at in range(WORLD)]


def ask(stage: int, times: int, seed: int, steps: int) -> dict[str, Any]:
    dice = random.Random(seed)
    with tempfile.TemporaryDirectory() as name:
        stops = Stops(Path(name), stage, steps)
        most = max(1, steps // (times + 1) - 1)
        for number in range(times):
            way, rank = WAYS[number % len(WAYS)], dice.randrange(WORLD)
            stops.stop(way, rank, dice.randint(1, most), dice.uniform(0, 0.2))
        stops.finish()
    return {"stage": stage, "seed": seed, **stops.found()}


def under_torchrun() -> dict[str, Any]:
    """As README.md says it: torchrun, which passes its signals on to every rank."""
    with tempfile.TemporaryDirectory() as name:
        stops, found = Stops(Path(name), 2, 12), []
        for number in ("SIGTERM", "SIGUSR1"):
            before = steps_taken(stops.run)
            log = stops.folder / "torchrun.txt"
            with log.open("wb") as said:
                process = subprocess.Popen(
                    [
                        *(sys.executable, "-m", "torch.distributed.run"),
                        *("--nproc-per-node", "2", "--master-port", str(free_port())),
                        *("--signals-to-handle", "SIGTERM,SIGINT,SIGUSR1", "-m", "asymlift", "--"),
                        *("finetune", *stops.words("asked")),
                    ],
                    env={**os.environ, **environment(0, 1, 0)},
                    cwd=ROOT,
                    stdout=said,
                    stderr=said,
                )
            while steps_taken(stops.run) < before + 2 and process.poll() is None:
                time.sleep(0.005)
            asked = time.monotonic()
            process.send_signal(getattr(signal, number))
            code, seconds = process.wait(), time.monotonic() - asked
            text, saved = log.read_text(errors="replace"), newest_step(stops.run)
            stops.expect(saved, steps_taken(stops.run), f"after {number} to torchrun, saved")
            stops.expect("saved; run the same command again" in text, True, f"after {number}, said")
            found.append(
                {
                    "sent": number,
                    "exit of torchrun": code,
                    "seconds to the end": round(seconds, 1),
                    "stopped after step": saved,
                }
            )
            report(str(found[-1]))
        stops.finish()
    return {"stops": found, "problems": stops.problems}


def main() -> None:
    get_ready()
    if sys.argv[1] == "torchrun":
        print(json.dumps(under_torchrun()))
    else:
        print(json.dumps(ask(*(int(word) for word in sys.argv[2:6]))))


if __name__ == "__main__":
    main()
