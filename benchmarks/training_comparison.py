"""What the control variate and the perceptual term are worth: the tiny model, equal compute.

    python -m benchmarks.training_comparison [--model tiny] [--steps 400] [--seeds 3] [--jobs 2]

Plain flow matching, variance-reduced, variance-reduced + perceptual. A kind that does without the
reference or the perceptual net gets the steps that its cheaper step pays for, by counted FLOPs.
Writes benchmarks/results/training_comparison-MODEL.json; finished runs are kept and not redone.
"""

import argparse
import json
import os
import shutil
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path
from statistics import mean, median, stdev
from typing import Any

import torch
from torch.utils.flop_counter import FlopCounterMode

from asymlift.artifacts.files import write_bytes_atomically
from asymlift.artifacts.manifest import canonical_json
from asymlift.data.order import derive
from asymlift.data.pictures import decode_image, image_to_float
from asymlift.embedded import IMAGE_SIZE, METRICS_NET
from asymlift.embedded.metrics import Measure
from asymlift.embedded.nets import FeatureNet
from asymlift.embedded.scenes import caption, make_scenes
from asymlift.recipe import Recipe, load_recipe
from asymlift.runtime import log
from asymlift.runtime.metrics import read_metrics
from asymlift.stages import demo
from asymlift.stages.verbs import (
    SampleRequest,
    run_convert,
    run_finetune,
    run_fit_basis,
    run_sample,
)

RESULTS = Path(__file__).parent / "results"
KINDS = {  # name -> what the recipe says
    "flow": ["finetune.loss.kind=flow", "finetune.loss.reference=shared"],
    "variance-reduced": [],
    "variance-reduced + perceptual": [],
}
NO_PERCEPTUAL = "finetune.loss.perceptual=null"
LAST_SHARE = 0.5  # of a run's measurements of gradient variance that enter the table


def recipe_of(out: Path, name: str, model: str, overrides: list[str]) -> Recipe:
    return load_recipe(
        demo.recipe_file("tiny.yaml"),
        [
            f"name={name}",
            f"runs={out}",
            f"model.base=embedded:{model}",
            f"data.train={out}/shared/shards/train",
            f"data.validation={out}/shared/shards/validation",
            "finetune.preview=null",
            "finetune.zero.stage=0",
            "finetune.checkpoint.every=100000",
            "finetune.validation={every: 100000, samples: 256, levels: 8}",
            "finetune.variance_every=10",
            *overrides,
        ],
    )


def overrides_of(kind: str, seed: int, steps: int) -> list[str]:
    perceptual = [] if kind.endswith("perceptual") else [NO_PERCEPTUAL]
    return [*KINDS[kind], *perceptual, f"finetune.seed={seed}", f"finetune.steps={steps}"]


def name_of(kind: str, seed: int) -> str:
    return f"{kind.replace(' + ', '-and-')}-{seed}"


def prepare(out: Path, model: str) -> None:
    """Data, basis and lifted model, once, for all runs."""
    recipe = recipe_of(out, "shared", model, [])
    demo.make_data(recipe, out / "shared")
    run_fit_basis(recipe)
    run_convert(recipe, verify="maps")


def flops_per_sample(out: Path, model: str, kind: str) -> float:
    """Of one sample's forward and backward, reference and perceptual passes included."""
    from asymlift.artifacts.lifted_folder import read_lifted
    from asymlift.families import FAMILIES
    from asymlift.model.training_step import Batch
    from asymlift.stages.finetune.model import build_step

    recipe = recipe_of(out, "shared", model, overrides_of(kind, 0, 1))
    lifted = read_lifted(out / "shared" / "lifted")
    family, count = FAMILIES[lifted.family], 4
    step, _ = build_step(recipe.finetune, lifted, family, None, torch.device("cpu"))
    side = IMAGE_SIZE // lifted.geometry.pixel_patch
    generator = torch.Generator().manual_seed(derive(0, "flops"))

    def noise(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator)

    width = step.student.net.config.joint_attention_dim
    text = family.collate([{"encoder_hidden_states": noise(12, width)}] * count)
    tokens = side * side
    batch = Batch(
        x0=noise(count, tokens, lifted.geometry.D),
        z0=noise(count, tokens, lifted.geometry.d),
        eps=noise(count, tokens, lifted.geometry.D),
        sigma=torch.full((count,), 0.5),
        weight=torch.ones(count),
        text=text,
        grid=(side, side),
    )
    with FlopCounterMode(display=False) as counter:
        loss, _ = step(batch)
        loss.backward()
    return counter.get_total_flops() / count


def train_and_measure(out: Path, model: str, kind: str, seed: int, steps: int) -> dict[str, Any]:
    torch.set_num_threads(1)
    name = name_of(kind, seed)
    recipe = recipe_of(out, name, model, overrides_of(kind, seed, steps))
    if not (out / name / "lifted").exists():
        shutil.copytree(out / "shared" / "lifted", out / name / "lifted", copy_function=os.link)
    run_finetune(recipe)
    lines = read_metrics(recipe.run_folder / "metrics.jsonl")
    variances = [line for line in lines if "gradient_variance" in line]
    late = variances[int(len(variances) * (1 - LAST_SHARE)) :]
    taken = [line for line in lines if "seconds" in line]
    return {
        "kind": kind,
        "seed": seed,
        "steps": steps,
        "seconds": sum(line["seconds"] - line["seconds_waiting_for_data"] for line in taken),
        "held-out loss at the start": lines[0]["validation_loss"],
        "held-out loss": lines[-1]["validation_loss"],
        "gradient variance": mean(line["gradient_variance"] for line in late),
        "gradient variance of the plain target": mean(
            line["gradient_variance_plain"] for line in late
        ),
        **pictures_scored(recipe),
    }


def pictures_scored(recipe: Recipe) -> dict[str, Any]:
    prompts = make_scenes(range(demo.NUM_PROMPTS), seed=demo.PROMPT_SEED, size=IMAGE_SIZE)
    captions = tuple(caption(row) for row in prompts.labels)
    folder = recipe.run_folder / "samples" / "scored"
    report = run_sample(recipe, SampleRequest(prompts=captions, weights=("ema",), out=folder))
    images = torch.stack(
        [
            image_to_float(decode_image((folder / entry["file"]).read_bytes()))
            for entry in report.pictures
        ]
    )
    reference = make_scenes(range(demo.NUM_REFERENCE), seed=demo.REFERENCE_SEED, size=IMAGE_SIZE)
    judge = Measure(FeatureNet.load(METRICS_NET), reference.image)
    return asdict(judge(images / 2 + 0.5, prompts.labels))


def summary(rows: list[dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """Per kind: mean and standard deviation over the seeds."""
    found: dict[str, dict[str, Any]] = {}
    for kind in KINDS:
        mine = [row for row in rows if row["kind"] == kind]
        if not mine:
            continue
        numbers = {
            key: [row[key] for row in mine]
            for key, value in mine[0].items()
            if isinstance(value, float)
        }
        numbers |= {
            f"accuracy of {part}": [row["accuracy_of"][part] for row in mine]
            for part in mine[0]["accuracy_of"]
        }
        found[kind] = {
            "steps": median(row["steps"] for row in mine),
            **{
                key: {"mean": mean(values), "sd": stdev(values) if len(values) > 1 else 0.0}
                for key, values in numbers.items()
            },
        }
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", choices=[demo.WEAK, demo.GOOD], default=demo.WEAK)
    parser.add_argument("--steps", type=int, default=400, help="of the dearest kind")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--jobs", type=int, default=2, help="runs at once")
    parser.add_argument("--out", type=Path, default=Path("runs/comparison"))
    parser.add_argument("--one", nargs=3, metavar=("KIND", "SEED", "STEPS"), help="a single run")
    use = parser.parse_args()
    out = use.out / use.model
    if use.one:
        kind, seed, steps = use.one
        row = train_and_measure(out, use.model, kind, int(seed), int(steps))
        write_bytes_atomically(out / name_of(kind, int(seed)) / "row.json", canonical_json(row))
        return
    prepare(out, use.model)
    flops = {kind: flops_per_sample(out, use.model, kind) for kind in KINDS}
    steps = {kind: round(use.steps * max(flops.values()) / flops[kind]) for kind in KINDS}
    log.say(f"MFLOPs per sample {flops}, steps {steps}")
    wanted = [(kind, seed) for seed in range(use.seeds) for kind in KINDS]
    missing = [w for w in wanted if not (out / name_of(*w) / "row.json").exists()]
    while missing:
        now, missing = missing[: use.jobs], missing[use.jobs :]
        command = [sys.executable, "-m", "benchmarks.training_comparison", "--model", use.model]
        started = [
            subprocess.Popen(
                [*command, "--out", str(use.out), "--one", kind, str(seed), str(steps[kind])]
            )
            for kind, seed in now
        ]
        assert [process.wait() for process in started] == [0] * len(now)
    rows = [json.loads((out / name_of(*w) / "row.json").read_bytes()) for w in wanted]
    found = {
        "model": use.model,
        "FLOPs per sample": flops,
        "kinds": summary(rows),
        "runs": rows,
    }
    path = RESULTS / f"training_comparison-{use.model}.json"
    path.write_text(json.dumps(found, indent=2) + "\n")
    for kind, numbers in found["kinds"].items():
        log.say(f"{kind}: {json.dumps(numbers)}")


if __name__ == "__main__":
    main()
