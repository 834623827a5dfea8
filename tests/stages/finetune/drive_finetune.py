"""Run several finetunes in one process, as one rank: drive_finetune.py RECIPE JOBS.

JOBS is JSON: a list of lists of `--set` overrides and of options of the command. Prints one JSON
line per finished run. With SEND="RANK STEP SIGNAL" in the environment, that rank sends itself the
signal in that step, after its gradients are made and before the update.
"""

import hashlib
import json
import os
import signal
import sys
import warnings
from pathlib import Path
from typing import Any

import torch

from asymlift.errors import UserError
from asymlift.recipe import Recipe, load_recipe
from asymlift.runtime import dist
from asymlift.stages.finetune import run as stage
from asymlift.stages.finetune.start import Start
from asymlift.stages.finetune.step import Trainer

# With DeepSpeed's defaults a small model stays whole on every rank, and ZeRO-3 proves nothing.
NOTHING_STAYS = {
    "stage3_param_persistence_threshold": 0,
    "stage3_max_live_parameters": 0,
    "stage3_max_reuse_distance": 0,
    "stage3_prefetch_bucket_size": 0,
}


def send_signals(ranks: dist.Ranks) -> None:
    rank, step, number = os.environ["SEND"].split()
    gradients = Trainer.gradients

    def then_signal(trainer: Trainer, at: int, *rest: Any) -> Any:
        means = gradients(trainer, at, *rest)
        if ranks.rank == int(rank) and at == int(step):
            os.kill(os.getpid(), getattr(signal, number))
        return means

    Trainer.gradients = then_signal  # type: ignore[method-assign]


def read_job(recipe: Path, words: list[str]) -> tuple[Recipe, Start]:
    options = {word for word in words if word.startswith("--")}
    resumes = [word.partition("=")[2] for word in options if word.startswith("--resume=")]
    start = Start(
        resume=resumes[0] if resumes else "auto",
        allow_changes="--allow-changes" in options,
        rehearse="--rehearse" in options,
    )
    return load_recipe(recipe, [word for word in words if word not in options]), start


def summary(report: stage.FinetuneReport) -> dict[str, Any]:
    lines = (report.folder / "metrics.jsonl").read_text().splitlines()
    digests = {
        path.stem: hashlib.sha256(path.read_bytes()).hexdigest()
        for path in report.checkpoint.glob("*.safetensors")
    }
    keys = ("step", "loss", "grad_norm", "control", "lr")
    return {
        "resumed_from": report.resumed_from,
        "metrics": [{key: json.loads(line).get(key) for key in keys} for line in lines],
        "digests": digests,
        "bad_samples": report.bad_samples,
    }


def main() -> None:
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    ranks = dist.discover()
    if "SEND" in os.environ:
        send_signals(ranks)
    for overrides in json.loads(sys.argv[2]):
        try:
            recipe, start = read_job(Path(sys.argv[1]), overrides)
            report = stage.finetune(recipe, ranks, start, zero3=NOTHING_STAYS)
        except UserError as error:
            sys.stderr.write(f"error: {error}\n")
            dist.end_process(int(error.exit))
        if ranks.first:
            print("RESULT", json.dumps(summary(report)), flush=True)
    dist.end_process(0)


if __name__ == "__main__":
    main()
