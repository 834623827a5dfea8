"""Does `asymlift plan` say the truth? Real finetune steps, measured, against what it predicts.

Each case is a real update of a model of about 55 M random numbers, with the engine, the losses and
the average of a finetune; cases of as many ranks share fresh processes, one after another.
`tensors` is the highest sum of the bytes of all tensors of rank 0, counted by storage (on a GPU:
what torch says it allocated); the plan, without its margin, is compared with that. `showing` is
what it takes besides to let the weights and their average change places. `rss` is how far
the peak resident memory grew over that before the model was built, with an allocator that gives
back what is freed; it also holds what libraries take for themselves, and not what is never written
to: gradients travel through a buffer that this model does not fill.

    python benchmarks/plan_memory.py [--only PATTERN] [--out benchmarks/results/plan_memory.json]
"""

import argparse
import gc
import json
import os
import platform
import re
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))
BUCKET = 20_000_000  # numbers: DeepSpeed's own would be more than the model
MODELS: dict[str, dict[str, Any]] = {
    "flux2": {
        "in_channels": 16,
        "num_layers": 5,
        "num_single_layers": 6,
        "attention_head_dim": 64,
        "num_attention_heads": 8,
        "joint_attention_dim": 256,
        "axes_dims_rope": (16, 16, 16, 16),
        "guidance_embeds": False,
    },
    "sd3": {
        "sample_size": 64,
        "in_channels": 4,
        "out_channels": 4,
        "num_layers": 6,
        "attention_head_dim": 64,
        "num_attention_heads": 8,
        "joint_attention_dim": 256,
        "caption_projection_dim": 512,
        "pooled_projection_dim": 256,
        "pos_embed_max_size": 48,
        "qk_norm": "rms_norm",
    },
}
LORA = {"lora": {"rank": 32, "alpha": 32.0, "dropout": 0.05}}
VGG = {"net": "vgg", "weights": "random"}
FULL = {"train": "full", "loss": {"reference": "copy", "perceptual": None}}
FLOW = {"train": "full", "loss": {"kind": "flow", "perceptual": None}}
NO_LPIPS = {"loss": {"perceptual": None}}
CHECKPOINTING = {"gradient_checkpointing": True}

# Formulas were written with a toy of two linear maps and the cases of the first block in view.
CASES: dict[str, tuple[int, dict[str, Any], str]] = {  # ranks, what differs, seen while writing
    "lora, stage 2": (1, {}, "seen"),
    "lora, stage 2, no perceptual net": (1, NO_LPIPS, "seen"),
    "lora, stage 0, 2 ranks": (2, {"zero": {"stage": 0}} | NO_LPIPS, "seen"),
    "lora, stage 3, 2 ranks": (2, {"zero": {"stage": 3}} | NO_LPIPS, "seen"),
    "full, stage 1, 2 ranks": (2, {"zero": {"stage": 1}} | FULL, "seen"),
    "full, stage 2": (1, {"zero": {"stage": 2}} | FULL, "seen"),
    "full, stage 3, 2 ranks": (2, {"zero": {"stage": 3}} | FULL, "seen"),
    "lora, stage 2, checkpointing": (1, CHECKPOINTING | NO_LPIPS, "unseen"),
    "lora, stage 2, 3 passes of 1": (1, {"batch": 3, "micro_batch": 1} | NO_LPIPS, "unseen"),
    "lora, stage 1, 2 ranks, bfloat16": (
        2,
        {"zero": {"stage": 1}, "precision": "bfloat16"} | NO_LPIPS,
        "unseen",
    ),
    "full, stage 0, float32": (1, {"zero": {"stage": 0}} | FLOW, "unseen"),
    "full, stage 2, 2 ranks, 2 passes": (2, {"batch": 8} | FULL, "unseen"),
    "full, stage 2, bfloat16": (1, {"precision": "bfloat16"} | FULL, "unseen"),
    "full, stage 3, 2 ranks, checkpointing": (
        2,
        {"zero": {"stage": 3}} | FLOW | CHECKPOINTING,
        "unseen",
    ),
    "full, stage 1, 3 passes, checkpointing": (
        1,
        {"zero": {"stage": 1}, "batch": 6} | FULL | CHECKPOINTING,
        "unseen",
    ),
    "sd3: lora, stage 2, 2 ranks": (2, {"family": "sd3"}, "unseen"),
    "sd3: full, stage 1": (1, {"family": "sd3", "zero": {"stage": 1}} | FULL, "unseen"),
}
GRID, LENGTH = (12, 12), 64  # tokens of a picture, and of a caption


def recipe_values(folder: Path, changes: dict[str, Any], ranks: int) -> dict[str, Any]:
    finetune = {
        "micro_batch": 2,
        "batch": 2 * ranks,
        "precision": "float32",
        "train": LORA,
        "loss": {"perceptual": VGG},
        "zero": {"stage": 2},
        "optimizer": {"lr_scale": {}},
        **{key: value for key, value in changes.items() if key != "family"},
    }
    return {
        "name": "run",
        "runs": str(folder),
        "model": {"base": str(folder), "text_length": LENGTH},
        "data": {"train": "none", "resize": {"sides": [8 * GRID[0]]}},
        "finetune": finetune,
    }


def write_lifted(folder: Path, family_name: str, config: dict[str, Any]) -> None:
    """A model of random weights, as convert would leave it."""
    import torch

    from asymlift.families import FAMILIES
    from asymlift.runtime import third_party
    from tests.tiny import tiny_vae

    family, vae = FAMILIES[family_name], tiny_vae(family_name)
    diffusers = third_party.library("diffusers")
    kind = getattr(diffusers, family.transformer)
    base = kind.from_config(config)
    geometry = family.geometry(dict(base.config), dict(vae.config))
    net = kind.from_config({**base.config, **family.channels(geometry.pixel_channels)})
    net.to(torch.bfloat16)
    for path in (family.first, family.last):
        net.get_submodule(path).float()
    lifted = folder / "run" / "lifted"
    net.save_pretrained(lifted / "transformer")
    vae.save_pretrained(lifted / "vae")
    parts = {"transformer": family.transformer, "vae": type(vae).__name__}
    index = {name: ["diffusers", kind] for name, kind in parts.items()}
    (lifted / "model_index.json").write_text(json.dumps(index))
    (lifted / "transformer" / "asymlift.json").write_text("{}")


# ---- one rank of one case ------------------------------------------------------------------------


def child(cases: dict[str, dict[str, Any]], bucket: int) -> None:
    """One update of each; prints what rank 0 held at its highest."""
    import warnings

    warnings.simplefilter("ignore")
    import torch

    from asymlift.recipe import check_recipe
    from asymlift.runtime import dist, third_party
    from asymlift.runtime.engine import import_deepspeed

    torch.set_num_threads(1)
    third_party.library("diffusers")
    import_deepspeed()
    ranks = dist.discover()
    device = dist.device_for(ranks)
    dist.join(ranks, device, 600)
    for name, values in cases.items():
        found = one_update(check_recipe(values, "benchmark"), ranks, device, bucket)
        if ranks.first:
            print("RESULT", json.dumps({"case": name, **found}), flush=True)
    dist.end_process(0)


def one_update(recipe: Any, ranks: Any, device: Any, bucket: int) -> dict[str, Any]:
    import torch

    from asymlift.model.ema import Ema
    from asymlift.model.footprint import LiveBytes
    from asymlift.runtime.engine import Engine

    gc.collect()
    before = resident("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # VmHWM begins anew
    live = LiveBytes()
    step, trainable, settings = prepared(recipe, ranks, device, bucket)
    with live:
        for tensor in [*step.parameters(), *step.buffers(), *perceptual_weights(step)]:
            live.count(tensor)
        engine = Engine(step, trainable, settings, ranks)
        ema = Ema.of(trainable.parameters, ranks, recipe.finetune.ema.shard)
        gc.collect()
        live.restart()
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats()
        for number in range(settings.accumulation):
            engine.forward_backward(random_batch(recipe, step, device), 1.0)
            if number < settings.accumulation - 1:
                engine.micro_step_done()
        engine.update(dict.fromkeys(set(trainable.roles.values()), 1e-4), 1.0)
        ema.update(0.9)
        peak = live.peak if device.type == "cpu" else torch.cuda.max_memory_allocated()
        engine.inner.zero_grad()
        gc.collect()
        live.restart()
        before_showing = live.live
        with engine.showing(ema.shards, ema.owners):
            showing = live.peak - before_showing
    grown = resident("VmHWM") - before
    for _, storage in list(live.sizes.values()):  # DeepSpeed keeps its engines for ever
        if (one := storage()) is not None and one.resizable():
            one.resize_(0)
    return {"tensors": peak, "showing": showing, "rss": grown, "device": device.type}


def resident(name: str) -> int:
    found = re.search(rf"^{name}:\s+(\d+) kB", Path("/proc/self/status").read_text(), re.M)
    assert found
    return int(found[1]) * 1024


def prepared(recipe: Any, ranks: Any, device: Any, bucket: int) -> tuple[Any, Any, Any]:
    """The step as finetune builds it, and the engine's settings."""
    import torch

    from asymlift.artifacts.lifted_folder import Lifted
    from asymlift.runtime.engine import EngineSettings
    from asymlift.runtime.optimizers import OptimizerSettings
    from asymlift.stages.finetune.model import build_step
    from asymlift.stages.locate import lifted_path
    from asymlift.stages.plan.model import blueprint_of, color_of

    found = blueprint_of(recipe)
    use, family, geometry = recipe.finetune, found.family, found.geometry
    A = torch.linalg.qr(torch.randn(geometry.D, geometry.d))[0]
    folder = lifted_path(recipe)
    lifted = Lifted(folder, family.name, geometry, A, 1.0, color_of(recipe), {}, {})
    low = torch.bfloat16 if use.precision == "bfloat16" else None
    step, trainable = build_step(use, lifted, family, low, device)
    zero = {"reduce_bucket_size": min(bucket, trainable.num_parameters)}
    if use.zero.stage == 3:
        names = ("max_live_parameters", "max_reuse_distance", "prefetch_bucket_size")
        zero |= dict.fromkeys([f"stage3_{name}" for name in names], 0)
        zero["stage3_param_persistence_threshold"] = 0
    return (
        step,
        trainable,
        EngineSettings(
            zero_stage=use.zero.stage,
            offload=use.zero.offload,
            micro_batch=use.micro_batch,
            accumulation=use.batch // (use.micro_batch * ranks.world),
            optimizer=OptimizerSettings("adamw", (0.9, 0.95), 1e-8, 0.0, 0.95),
            autocast=low if use.train == "full" else None,
            zero3=zero,
        ),
    )


def perceptual_weights(step: Any) -> list[Any]:
    measure = step.perceptual[0]
    return [] if measure is None else [*measure.parameters(), *measure.buffers()]


def random_batch(recipe: Any, step: Any, device: Any) -> Any:
    import torch

    from asymlift.model.training_step import Batch
    from asymlift.stages.plan.model import blueprint_of, empty_text

    size, geometry = recipe.finetune.micro_batch, step.student.geometry
    tokens = GRID[0] * GRID[1]
    text = empty_text(blueprint_of(recipe), size, LENGTH)
    for value in text.values():
        value.normal_()
    return Batch(
        x0=torch.randn(size, tokens, geometry.D, device=device),
        z0=torch.randn(size, tokens, geometry.d, device=device),
        eps=torch.randn(size, tokens, geometry.D, device=device),
        sigma=torch.full((size,), 0.3),
        weight=torch.ones(size),
        text={name: value.to(device) for name, value in text.items()},
        grid=GRID,
    )


# ---- all cases -----------------------------------------------------------------------------------


def predicted(values: dict[str, Any], ranks: int, bucket: int = BUCKET) -> dict[str, Any]:
    import torch

    from asymlift.recipe import check_recipe
    from asymlift.stages.plan.memory import Limits, Planner
    from asymlift.stages.plan.model import blueprint_of

    recipe = check_recipe(values, "benchmark")
    device = "cuda" if torch.cuda.is_available() else "cpu"
    limits = Limits(bucket=bucket, live=0, persistent=0)
    planner = Planner(recipe, blueprint_of(recipe), ranks, device=device, limits=limits)
    assert planner.grid == GRID
    memory = planner.own
    return {
        "tensors": memory.highest,
        "showing": planner.exchange(recipe.finetune),
        "resident": {name: size for name, size in memory.resident.items() if size},
        "phases": memory.phases,
    }


def measured(
    cases: dict[str, dict[str, Any]], ranks: int, bucket: int = BUCKET
) -> Iterator[tuple[str, dict[str, Any]]]:
    """Each case as soon as it is done."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    processes = [
        subprocess.Popen(
            [sys.executable, __file__, "--child", json.dumps([cases, bucket])],
            env={
                **os.environ,
                **dict.fromkeys(("RANK", "LOCAL_RANK"), str(rank)),
                "WORLD_SIZE": str(ranks),
                "MASTER_ADDR": "127.0.0.1",
                "MASTER_PORT": str(port),
                "OMP_NUM_THREADS": "1",
                "MALLOC_ARENA_MAX": "1",
                "MALLOC_TRIM_THRESHOLD_": "0",
                "MALLOC_MMAP_THRESHOLD_": "65536",
            },
            stdout=subprocess.PIPE,
            text=True,
        )
        for rank in range(ranks)
    ]
    out = processes[0].stdout
    assert out is not None
    for line in out:
        if line.startswith("RESULT "):
            found = json.loads(line[7:])
            yield found.pop("case"), found
    assert not any(process.wait() for process in processes)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--child")
    parser.add_argument("--only", default="")
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    if options.child:
        child(*json.loads(options.child))
        return
    rows, started = [], time.monotonic()
    with tempfile.TemporaryDirectory() as place:
        for name, config in MODELS.items():
            write_lifted(Path(place) / name, name, config)
        for ranks in (1, 2):
            chosen = {
                name: recipe_values(Path(place) / changes.get("family", "flux2"), changes, ranks)
                for name, (count, changes, _) in CASES.items()
                if count == ranks and re.search(options.only, name)
            }
            for name, real in measured(chosen, ranks) if chosen else ():
                plan = predicted(chosen[name], ranks)
                error = plan["tensors"] / real["tensors"] - 1
                rows.append({"case": name, "ranks": ranks, "while_writing": CASES[name][2]})
                rows[-1] |= {"planned": plan, "measured": real, "error": round(error, 4)}
                print(
                    f"{name:40} planned {plan['tensors'] / 1e6:6.0f} MB  tensors "
                    f"{real['tensors'] / 1e6:6.0f} MB  {error:+6.1%}  "
                    f"rss {real['rss'] / 1e6:6.0f} MB",
                    flush=True,
                )
    errors = {
        kind: [abs(row["error"]) for row in rows if row["while_writing"] == kind]
        for kind in ("seen", "unseen")
    }
    report = {
        "what": __doc__,
        "machine": f"{platform.machine()}, {os.cpu_count()} cores",
        "seconds": round(time.monotonic() - started),
        "largest_error": {kind: max(found, default=None) for kind, found in errors.items()},
        "cases": rows,
    }
    if options.out:
        options.out.write_text(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    main()
