"""Finetunes on two ranks of which one gets into trouble: drive_trouble.py RECIPE FOLDER JOBS.

JOBS is JSON, of every run's name [WHAT, RANK, OVERRIDES]; "{rank}" in an override is the process's
own. All run at once. Prints JSON: what forked.Group.told says of each.
"""

import json
import os
import signal
import sys
import warnings
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch

from asymlift.model.loading import load_pipeline_parts
from asymlift.recipe import load_recipe
from asymlift.runtime import dist, watch
from asymlift.runtime.engine import import_deepspeed
from asymlift.runtime.watchdog import watched
from asymlift.stages.finetune import preview
from asymlift.stages.finetune import run as stage
from asymlift.stages.finetune.step import Trainer
from tests.runtime.forked import Group, run_all
from tests.stages.finetune.drive_finetune import NOTHING_STAYS

STOPPED_FOR = 15  # seconds until it is noticed
STEP = 4  # counted from 0; a checkpoint is there by then


def in_a_step(trouble: Callable[[], object]) -> None:
    """Between the gradients and the update of one step."""
    gradients = Trainer.gradients

    def then_trouble(trainer: Trainer, at: int, *rest: Any) -> Any:
        made = gradients(trainer, at, *rest)
        if at == STEP:
            trouble()
        return made

    Trainer.gradients = then_trouble  # type: ignore[method-assign]


def in_a_preview(trouble: Callable[[], object]) -> None:
    """From the second time on, pictures of nothing but NaN."""
    make, drawn = preview.pixel_painter, []

    def make_painter(*given: Any) -> Any:
        paint = make(*given)
        drawn.append(paint)

        def troubled(indices: Any, text: Any, *rest: Any) -> Any:
            if len(drawn) > 1:
                trouble()
                text = {name: value * float("nan") for name, value in text.items()}
            return paint(indices, text, *rest)

        return troubled

    preview.pixel_painter = make_painter


def prepare(what: str, mark: Path) -> None:
    def stop() -> None:
        mark.touch()
        os.kill(os.getpid(), signal.SIGSTOP)

    def take_all_memory() -> None:
        mark.touch()
        torch.empty(1 << 60)

    {
        "stop": lambda: in_a_step(stop),
        "memory": lambda: in_a_step(take_all_memory),
        "preview": lambda: in_a_preview(mark.touch),
        "nothing": lambda: None,
    }[what]()


def train(
    ranks: dist.Ranks, recipe: Path, what: str, rank: int, overrides: list[str], mark: Path
) -> None:
    if what == "stop":  # the start is not what is looked at, and a busy machine is slow at it
        watch.FIRST_TIME = 20
        stage.watched = lambda ranks, _: watched(ranks, STOPPED_FOR)
    if ranks.rank == rank:
        prepare(what, mark)
    own = [word.replace("{rank}", str(ranks.rank)) for word in overrides]
    stage.finetune(load_recipe(recipe, own), ranks, zero3=NOTHING_STAYS)


def main() -> None:
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    recipe, folder, jobs = Path(sys.argv[1]), Path(sys.argv[2]), json.loads(sys.argv[3])
    import_deepspeed()
    load_pipeline_parts(recipe.parent / "run" / "lifted", ["vae"])  # imports what it needs
    groups = []
    for name, (what, rank, overrides) in jobs.items():
        more = {"what": what, "rank": rank, "overrides": overrides, "mark": folder / name / "mark"}
        groups.append(Group(folder / name, 2, rank, partial(train, recipe=recipe, **more)))
    run_all(groups, 280)
    print(json.dumps({name: group.told() for name, group in zip(jobs, groups, strict=True)}))


if __name__ == "__main__":
    main()
