"""One rank of finetunes in which one micro-batch of one rank is poisoned: poison.py RECIPE JOBS.

JOBS is JSON, a list of {"overrides": [...], "kind": KIND, "value": "nan" or "inf", "rank": RANK,
"micro": NUMBER, "steps": [...]}, numbers from 0. The package knows nothing of this.
"""

import json
import os
import socket
import subprocess
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from asymlift.errors import UserError
from asymlift.recipe import load_recipe
from asymlift.runtime import dist
from asymlift.runtime.engine import Engine
from asymlift.stages.finetune import run as stage
from asymlift.stages.finetune.step import Trainer

ROOT = Path(__file__).parents[2]
KINDS = ("loss", "input", "gradient")
Job = dict[str, Any]


def infect(job: Job, ranks: dist.Ranks) -> Callable[[], None]:
    """Patch what makes gradients; returns how to undo it."""
    gradients, forward_backward = Trainer.gradients, Engine.forward_backward
    now = {"step": -1, "micro": -1}
    bad = float(job["value"])

    def counted(trainer: Any, step: int, *more: Any) -> Any:
        now.update(step=step, micro=-1)
        return gradients(trainer, step, *more)

    def poisoned(engine: Any, batch: Any, scale: float) -> Any:
        now["micro"] += 1
        here = (ranks.rank, now["micro"]) == (job["rank"], job["micro"])
        if not here or now["step"] not in job["steps"] or not batch.weight.any():
            return forward_backward(engine, batch, scale)
        if job["kind"] == "loss":
            return forward_backward(engine, batch, scale * bad)
        if job["kind"] == "input":
            batch.x0[0, 0, 0] = bad
            return forward_backward(engine, batch, scale)
        (parameter, *_) = engine.trainable.parameters.values()
        hook = parameter.register_hook(lambda gradient: gradient * bad)
        try:
            return forward_backward(engine, batch, scale)
        finally:
            hook.remove()

    def undo() -> None:
        Trainer.gradients, Engine.forward_backward = gradients, forward_backward  # type: ignore

    Trainer.gradients, Engine.forward_backward = counted, poisoned  # type: ignore
    return undo


def main() -> None:
    from tests.stages.finetune.drive_finetune import NOTHING_STAYS

    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    ranks = dist.discover()
    for job in json.loads(sys.argv[2]):
        undo = infect(job, ranks)
        try:
            stage.finetune(
                load_recipe(Path(sys.argv[1]), job["overrides"]), ranks, zero3=NOTHING_STAYS
            )
        except UserError as error:
            sys.stderr.write(f"error: {error}\n")
            dist.end_process(int(error.exit))
        undo()
    dist.end_process(0)


# ---- from outside ------------------------------------------------------------------------------


def poison(recipe: Path, jobs: list[Job], ranks: int = 2) -> tuple[list[int], list[str]]:
    """Run the jobs on so many ranks: exit codes, and what each rank said."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    shared = {"WORLD_SIZE": str(ranks), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    shared |= {"OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu", "PYTHONPATH": str(ROOT)}
    processes = [
        subprocess.Popen(
            [sys.executable, "-m", "tests.reliability.poison", str(recipe), json.dumps(jobs)],
            env={**os.environ, **shared, "RANK": str(rank), "LOCAL_RANK": str(rank)},
            cwd=ROOT,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(ranks)
    ]
    said = [process.communicate(timeout=900)[1] for process in processes]
    return [process.returncode for process in processes], said


if __name__ == "__main__":
    main()
