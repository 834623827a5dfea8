"""What a run with a poisoned micro-batch must have left behind, judged from its files alone."""

import json
from pathlib import Path
from typing import Any

import torch

from asymlift.artifacts.checkpoint import open_checkpoint, step_folder
from asymlift.artifacts.safetensors_stream import load_tensors
from tests.reliability.poison import Job
from tests.stages.small_run import another_run

STEPS, STEP = 4, 1  # the second of four updates is poisoned
SHORT = [
    f"finetune.steps={STEPS}",
    "finetune.micro_batch=2",  # two ranks then accumulate two
    "finetune.checkpoint={every: 1, keep: 10}",
    "finetune.loss.perceptual=null",
    "finetune.ema.from_step=0",
]


def job(recipe: Path, stage: int, kind: str, value: str, **more: Any) -> Job:
    name = f"poison-{stage}-{kind}-{value}"
    overrides = [another_run(recipe, name), f"finetune.zero.stage={stage}", *SHORT]
    where = {"kind": kind, "value": value, "rank": 1, "micro": 1, "steps": [STEP]}
    return {"name": name, "overrides": overrides, **where, **more}


def problems_of(folder: Path) -> list[str]:
    """Everything that is not as it should be; each in words."""
    found: list[str] = []
    tensors, updates = {}, {}
    for step in range(1, STEPS + 1):
        checkpoint = open_checkpoint(step_folder(folder / "checkpoints", step))
        updates[step] = checkpoint.state["updates"]
        tensors[step] = {
            f"{path.stem}/{name}": tensor
            for path in sorted(checkpoint.folder.glob("*.safetensors"))
            for name, tensor in load_tensors(path).items()
        }
        found += [
            f"step {step}: {name} is not finite"
            for name, tensor in tensors[step].items()
            if not bool(torch.isfinite(tensor).all())
        ]
    before, left_out, after = (tensors[STEP + n] for n in range(3))
    found += [f"{name} changed" for name in before if not torch.equal(before[name], left_out[name])]
    if all(torch.equal(left_out[name], after[name]) for name in after):
        found.append("nothing was learnt afterwards")
    if updates != {1: 1, 2: 1, 3: 2, 4: 3}:
        found.append(f"updates counted: {updates}")
    lines = (folder / "logs/not-finite.jsonl").read_text().splitlines()
    entries = [json.loads(line) for line in lines]
    if [(entry["step"], len(entry["keys"])) for entry in entries] != [(STEP + 1, 8)]:
        found.append(f"written down: {entries}")
    return found
