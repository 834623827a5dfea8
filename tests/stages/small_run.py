"""A lifted model and two shards, small and real: the embedded model over a few scenes."""

import json
import os
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import yaml

from asymlift.data.pictures import float_to_image
from asymlift.data.records import Sample
from asymlift.data.writer import write_shard
from asymlift.embedded import MODELS
from asymlift.embedded.scenes import Scenes, make_scenes
from asymlift.families import FAMILIES
from asymlift.model.loading import load_pipeline
from asymlift.recipe import Recipe, check_recipe
from asymlift.stages.verbs import run_convert, run_fit_basis

DRIVER = Path(__file__).with_name("finetune") / "drive_finetune.py"
ROOT = Path(__file__).parents[2]
NUM_SHARDS, SHARD_SAMPLES, TEXT_LENGTH = 2, 24, 12


def recipe_values(runs: Path, name: str = "run") -> dict[str, Any]:
    """A finetune of seconds; every random thing is on."""
    return {
        "name": name,
        "runs": str(runs),
        "model": {"base": "embedded:tiny", "text_length": TEXT_LENGTH},
        "data": {
            "train": str(runs / "shards" / "{000000..000001}.tar"),
            "workers": 2,
            "caption_dropout": 0.2,
        },
        "color": {"space": "rgb", "mean": "fit", "std": "fit"},
        "basis": {"images": 32, "holdout": 16},
        "finetune": {
            "steps": 8,
            "batch": 8,
            "micro_batch": 4,
            "precision": "float32",
            "train": "full",
            "loss": {
                "reference": "copy",
                "weight": 1.0,
                "perceptual": {"net": "embedded", "weight": 0.2},
            },
            "time": {"shift": 4.0},
            "optimizer": {"lr": 1e-3, "lr_scale": {}},
            "schedule": {"warmup": 2},
            "clip": {"norm": 0.5, "from_step": 2},
            "ema": {"from_step": 2},
            "checkpoint": {"every": 3, "keep": 2, "milestone": None},
            "timeout": 60,
        },
        "sample": {
            "solver": "euler",
            "steps": 4,
            "guidance": 1.0,
            "shift": 4.0,
            "height": 32,
            "width": 32,
        },
    }


LORA = [
    "finetune.train={lora: {rank: 4, alpha: 8, dropout: 0.1}}",
    "finetune.loss.reference=shared",
    "finetune.precision=bfloat16",
    "finetune.gradient_checkpointing=true",
    "finetune.optimizer.lr_scale={last: 3.0}",
]


def small_recipe(runs: Path, **sections: Any) -> Recipe:
    return check_recipe({**recipe_values(runs), **sections}, "small recipe")


@torch.no_grad()
def encoded(scenes: Scenes, keys: list[str]) -> Iterator[Sample]:
    """As somebody else's program may have cached them: nothing says what made them."""
    family, pipeline = FAMILIES["flux2"], load_pipeline(MODELS["tiny"])
    images = float_to_image(scenes.image * 2 - 1)
    latents = family.encode_latents(pipeline.vae, scenes.image * 2 - 1)
    texts = family.encode_prompt(pipeline, scenes.captions, TEXT_LENGTH)
    columns = (keys, images, scenes.captions, latents, texts)
    for key, image, words, latent, text in zip(*columns, strict=True):
        yield Sample(key, image, words, latent=latent, text=text)


def build(runs: Path) -> Path:
    """Shards, basis and lifted model under `runs`; returns the recipe file."""
    for number in range(NUM_SHARDS):
        indices = range(number * SHARD_SAMPLES, (number + 1) * SHARD_SAMPLES)
        samples = encoded(make_scenes(indices, seed=0, size=32), [f"{n:06d}" for n in indices])
        write_shard(runs / "shards" / f"{number:06d}.tar", samples)
    recipe = small_recipe(runs)
    run_fit_basis(recipe)
    run_convert(recipe, verify="maps")
    path = runs / "recipe.yaml"
    path.write_text(yaml.safe_dump(recipe_values(runs)))
    return path


def another_run(recipe: Path, name: str) -> str:
    """Give the lifted model to a run of another name; returns the override."""
    runs = recipe.parent
    (runs / name).mkdir(exist_ok=True)
    if not (runs / name / "lifted").exists():
        (runs / name / "lifted").symlink_to(runs / "run" / "lifted")
    return f"name={name}"


def drive(
    recipe: Path,
    jobs: list[list[str]],
    *,
    ranks: int = 1,
    send: str = "",
    seconds: float = 240,
) -> tuple[list[dict[str, Any]], list[int], list[str]]:
    """Run the jobs on so many ranks: (results of rank 0, exit codes, what each rank said)."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    processes = []
    for rank in range(ranks):
        environment = {
            **os.environ,
            "RANK": str(rank),
            "LOCAL_RANK": str(rank),
            "WORLD_SIZE": str(ranks),
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": str(port),
            "OMP_NUM_THREADS": "1",
            "DS_ACCELERATOR": "cpu",
            "PYTHONPATH": str(ROOT),
            **({"SEND": send} if send else {}),
        }
        processes.append(
            subprocess.Popen(
                [sys.executable, str(DRIVER), str(recipe), json.dumps(jobs)],
                env=environment,
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                text=True,
            )
        )
    said = [process.communicate(timeout=seconds) for process in processes]
    lines = said[0][0].splitlines()
    results = [json.loads(line[7:]) for line in lines if line.startswith("RESULT ")]
    return results, [process.returncode for process in processes], [text for _, text in said]
