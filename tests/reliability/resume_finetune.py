"""Go on with a finetune at another ZeRO stage and on another number of ranks.

    python -m tests.reliability.resume_finetune lora,full 1,2,3 1,2,4 [clipped] [accumulated]

Every run that was saved after step 2 goes on, to step 4, at every stage and on every number of
ranks; the run that nobody disturbed, of the same stage and ranks as the second half, is what it
must equal. float32, and no dropout of adapters, whose masks follow from the rank.

What restores is exact; what follows is exact where both stages add in the same order. More than two
ranks are added in another order at ZeRO-3, and with `accumulated` micro-batches ZeRO-1 adds them up
before the ranks, the others after. `clipped` has every update clipped. Prints one JSON document.
"""

import json
import math
import os
import shutil
import sys
import tempfile
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice, product
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

from tests.reliability.kill_finetune import report
from tests.stages.small_run import another_run, build, drive

HALF, STEPS = 2, 4
KINDS = {
    "lora": [
        "finetune.train={lora: {rank: 4, alpha: 8, dropout: 0.0}}",
        "finetune.loss.reference=shared",
        "finetune.optimizer.lr_scale={last: 3.0}",
    ],
    "full": [],
}
BATCH = 8
SHARED = [
    f"finetune.batch={BATCH}",
    "finetune.loss.perceptual=null",
    "finetune.checkpoint={every: 1000, keep: 1, milestone: null}",
]
UNCLIPPED, CLIPPED = "finetune.clip.norm=1000", "finetune.clip={norm: 0.01, from_step: 0}"


@dataclass(frozen=True)
class Place:
    """What trains, and where."""

    kind: str
    stage: int
    ranks: int

    def __str__(self) -> str:
        return f"{self.kind}-{self.stage}-{self.ranks}"


class Matrix:
    """The runs of one folder; their results by name."""

    def __init__(self, folder: Path, *, clipped: bool = False, accumulation: int = 1) -> None:
        self.recipe, self.accumulation = build(folder), accumulation
        self.shared = [*SHARED, CLIPPED if clipped else UNCLIPPED]
        self.results: dict[str, dict[str, Any]] = {}
        self.weights: dict[str, dict[str, torch.Tensor]] = {}

    def job(self, name: str, place: Place, steps: int) -> list[str]:
        return [
            another_run(self.recipe, name),
            *KINDS[place.kind],
            *self.shared,
            f"finetune.micro_batch={BATCH // place.ranks // self.accumulation}",
            f"finetune.zero.stage={place.stage}",
            f"finetune.steps={steps}",
        ]

    def run(self, jobs: dict[str, list[str]], ranks: int) -> None:
        """All of them in one group of processes, each of which starts once."""
        for some in batched(jobs, 12):
            found, codes, said = drive(
                self.recipe, [jobs[name] for name in some], ranks=ranks, seconds=900
            )
            assert codes == [0] * ranks, said
            self.results |= dict(zip(some, found, strict=True))
        for name in jobs:
            [newest] = (self.recipe.parent / name / "checkpoints").glob("step-*")
            self.weights[name] = load_file(newest / "trainable.safetensors")

    def begin(self, places: Iterable[Place], ranks: int) -> None:
        """The first halves that run on so many ranks."""
        here = [place for place in places if place.ranks == ranks]
        self.run({f"half-{place}": self.job(f"half-{place}", place, HALF) for place in here}, ranks)
        report(f"{ranks} rank(s): {len(here)} runs to begin with")

    def go_on(self, pairs: Sequence[tuple[Place, Place]], ranks: int) -> None:
        """The second halves that run on so many ranks, and whole runs to compare them with."""
        here = {name_of(old, new): (old, new) for old, new in pairs if new.ranks == ranks}
        for name, (old, _) in here.items():
            shutil.copytree(
                self.recipe.parent / f"half-{old}" / "checkpoints",
                self.recipe.parent / name / "checkpoints",
                copy_function=os.link,
            )
        jobs = {name: self.job(name, new, STEPS) for name, (_, new) in here.items()}
        wholes = {f"whole-{new}": new for _, new in here.values()}
        jobs |= {name: self.job(name, place, STEPS) for name, place in wholes.items()}
        self.run(jobs, ranks)
        for name in jobs:
            shutil.rmtree(self.recipe.parent / name)
        report(f"{ranks} rank(s): {len(here)} runs that went on")

    def compare(self, old: Place, new: Place) -> dict[str, Any]:
        found, whole = self.results[name_of(old, new)], self.results[f"whole-{new}"]
        assert found["resumed_from"] == HALF
        then, now = self.weights[f"whole-{new}"], self.weights[name_of(old, new)]
        lengths = {name: float(weight.norm()) for name, weight in then.items()}
        off = {name: float((now[name] - weight).norm()) for name, weight in then.items()}
        return {
            "from": str(old),
            "to": str(new),
            "equal": found["digests"] == whole["digests"]
            and second_half(whole, "loss") == second_half(found, "loss"),
            "loss": max(map(apart, second_half(whole, "loss"), second_half(found, "loss"))),
            "norm": max(
                map(apart, second_half(whole, "grad_norm"), second_half(found, "grad_norm"))
            ),
            "weights": math.hypot(*off.values()) / math.hypot(*lengths.values()),
            "worst_tensor": max(off[name] / lengths[name] for name in then),
        }


def name_of(old: Place, new: Place) -> str:
    return f"{old}-to-{new}"


def second_half(result: dict[str, Any], key: str) -> list[float]:
    return [line[key] for line in result["metrics"] if line["step"] > HALF]


def batched(names: Iterable[str], size: int) -> Iterator[list[str]]:
    waiting = iter(names)
    while some := list(islice(waiting, size)):
        yield some


def apart(a: float, b: float) -> float:
    return abs(a - b) / abs(a)


def compare_all(
    pairs: Sequence[tuple[Place, Place]], *, clipped: bool = False, accumulation: int = 1
) -> list[Any]:
    olds = dict.fromkeys(old for old, _ in pairs)
    with tempfile.TemporaryDirectory() as name:
        matrix = Matrix(Path(name), clipped=clipped, accumulation=accumulation)
        for ranks in sorted({old.ranks for old in olds}):
            matrix.begin(olds, ranks)
        for ranks in sorted({new.ranks for _, new in pairs}):
            matrix.go_on(pairs, ranks)
        return [matrix.compare(old, new) for old, new in pairs]


def main() -> None:
    kinds, stages, ranks = (words.split(",") for words in sys.argv[1:4])
    places = [Place(k, int(s), int(r)) for k, s, r in product(kinds, stages, ranks)]
    pairs = [(old, new) for old, new in product(places, places) if old.kind == new.kind]
    accumulation = 2 if "accumulated" in sys.argv else 1
    found = compare_all(pairs, clipped="clipped" in sys.argv, accumulation=accumulation)
    print(json.dumps(found))


if __name__ == "__main__":
    main()
