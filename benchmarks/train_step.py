"""What a training step costs beside the passes that it cannot do without, and what it holds.

    python -m benchmarks.train_step [--models tiny large] [--rounds N] [--perceptual embedded alex]
                                    [--no-memory]

Rounds are interleaved, so that a busy machine slows all alike, and medians are compared. `bare` is
the stock transformer: forward and backward with a trivial loss, and a forward without gradients in
the place of the reference, at the same shapes and in the same precision. `step` is everything
between two steps of a run: batch, losses, figures, update. On a CPU, processor seconds of the
process count, as waiting for other programs is nobody's cost; on a GPU, wall seconds.
Then peak memory and time of each way to train, on 1 and 2 processes. Every measurement has
processes of its own. Writes benchmarks/results/train_step.json, keeping what is not measured again.
"""

import argparse
import json
import os
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from asymlift.data.feed import StepSamples
from asymlift.data.records import Sample
from asymlift.embedded import MODELS
from asymlift.families import FAMILIES
from asymlift.families.base import Geometry
from asymlift.maths.color import ColorCode
from asymlift.model.batch import BatchMaker
from asymlift.model.noise_levels import NoiseLevels
from asymlift.model.pixel_flow import PixelFlow
from asymlift.model.reference import as_reference
from asymlift.recipe import FinetuneSection
from asymlift.runtime import dist, third_party
from asymlift.runtime.dist import Ranks
from asymlift.runtime.engine import Engine, EngineSettings
from asymlift.runtime.memory import peak_of_process
from asymlift.runtime.optimizers import OptimizerSettings
from asymlift.runtime.signals import StopRequest
from asymlift.stages.finetune.ledger import Ledger
from asymlift.stages.finetune.model import assemble_step, load_perceptual
from asymlift.stages.finetune.step import Trainer

RESULTS = Path(__file__).parent / "results" / "train_step.json"
FAMILY = FAMILIES["flux2"]
COLOR = ColorCode("oklab", (0.56, 0.0, 0.01), 0.16)
SCALE = 1.0
STRICT = {"stage3_param_persistence_threshold": 0}  # a small model is sharded as a large one is
MEASURED_STEP = 999  # a step in which the gradient's variance is measured; step 0 is none


@dataclass(frozen=True)
class Model:
    """A transformer of some size, with random weights, and the batch that it is trained with."""

    geometry: Geometry
    config: dict[str, Any]
    side: int  # tokens
    micro_batch: int
    words: int  # tokens of text

    def net(self) -> Any:
        channels = FAMILY.channels(self.geometry.pixel_channels)
        diffusers = third_party.library("diffusers")
        torch.manual_seed(0)
        return getattr(diffusers, FAMILY.transformer).from_config({**self.config, **channels})


def tiny() -> Model:
    """The embedded model: 16 tokens, so that what surrounds it weighs as much as it can."""
    config = json.loads((MODELS["tiny"] / "transformer" / "config.json").read_text())
    return Model(Geometry(4, 4, 2), config, side=4, micro_batch=32, words=12)


def large() -> Model:
    """47 million parameters and 256 tokens of 16 pixels: its matrices dominate, as on a GPU."""
    config = {
        "num_layers": 3,
        "num_single_layers": 6,
        "attention_head_dim": 64,
        "num_attention_heads": 8,
        "joint_attention_dim": 256,
        "timestep_guidance_channels": 64,
        "axes_dims_rope": (16, 16, 16, 16),
        "guidance_embeds": False,
    }
    return Model(Geometry(8, 32, 2), config, side=16, micro_batch=2, words=32)


WAYS = [("lora", 2, 1), ("lora", 2, 2), ("lora", 3, 2), *(("full", n, 2) for n in (1, 2, 3))]
BUILD: dict[str, Callable[[], Model]] = {"tiny": tiny, "large": large}


class Data:
    """The same samples in every step, in memory; it is its own feed."""

    def __init__(self, model: Model, settings: FinetuneSection) -> None:
        self.model = model
        side, patch = model.side, model.geometry.patch
        pixels = side * model.geometry.pixel_patch
        g = torch.Generator().manual_seed(0)
        self.samples = [
            Sample(
                f"{number}",
                torch.randint(0, 256, (3, pixels, pixels), generator=g, dtype=torch.uint8),
                "",
                latent=torch.randn(model.geometry.channels, side * patch, side * patch),
                text=self.words(),
            )
            for number in range(settings.micro_batch)
        ]
        self.size = (pixels, pixels)

    def words(self) -> dict[str, torch.Tensor]:
        width = self.model.config["joint_attention_dim"]
        return {"encoder_hidden_states": torch.randn(self.model.words, width)}

    def step(self, step: int) -> StepSamples:
        return StepSamples(0, [list(self.samples)], [self.size])

    def epoch(self, step: int, read: StepSamples) -> float:
        return 0.0


class Bench:
    """One model under one engine, and the same model bare."""

    def __init__(self, name: str, way: str, stage: int, ranks: Ranks, folder: Path) -> None:
        self.model, self.ranks, self.device = BUILD[name](), ranks, dist.device_for(ranks)
        dist.join(ranks, self.device, timeout=600)
        self.precision = torch.bfloat16 if self.device.type == "cuda" else None
        self.settings = self.settings_for(way, stage)
        step, trainable = self.assembled()
        use = self.settings.optimizer
        optimizer = OptimizerSettings(use.kind, use.betas, use.eps, use.weight_decay, use.momentum)
        engine = Engine(
            step,
            trainable,
            EngineSettings(
                zero_stage=stage,
                offload="none",
                micro_batch=self.model.micro_batch,
                accumulation=1,
                optimizer=optimizer,
                autocast=self.precision if way == "full" else None,
                zero3=STRICT if stage == 3 else {},
            ),
            ranks,
        )
        self.step, self.num_trained = step, trainable.num_parameters
        data: Any = Data(self.model, self.settings)
        self.data, self.request = data, StopRequest()
        maker = BatchMaker(
            FAMILY,
            self.model.geometry,
            COLOR,
            self.device,
            null_text=data.words(),
            caption_dropout=0.1,
            draw_sigma=NoiseLevels(self.settings.time, self.settings.batch),
            encode_latents=None,
            encode_captions=None,
        )
        ledger = Ledger(folder, ranks, 0.01)
        self.trainer = Trainer(self.settings, engine, None, maker, data, ledger, print)

    def settings_for(self, way: str, stage: int) -> FinetuneSection:
        micro = self.model.micro_batch
        lora = {"lora": {"rank": 16, "alpha": 16.0, "dropout": 0.0}}
        return FinetuneSection.model_validate(
            {
                "batch": micro * self.ranks.world,
                "micro_batch": micro,
                "precision": "bfloat16" if self.precision else "float32",
                "train": "full" if way == "full" else lora,
                "loss": {
                    "reference": "copy" if way == "full" else "shared",
                    "perceptual": None,
                },
                "optimizer": {"lr": 1e-5, "lr_scale": {}},
                "zero": {"stage": stage},
                "variance_every": MEASURED_STEP + 1,
                "ema": None,
            }
        )

    def assembled(self) -> tuple[Any, Any]:
        geometry = self.model.geometry
        A = torch.linalg.qr(torch.randn(geometry.D, geometry.d))[0]

        def load() -> PixelFlow:
            flow = PixelFlow(self.model.net(), FAMILY, geometry, A, SCALE, self.precision)
            return flow.to(self.device)

        step, trainable = assemble_step(self.settings, FAMILY, load, COLOR.decode, None)
        return step.to(self.device), trainable

    def take(self, number: int = 0) -> None:
        self.trainer.take(number, self.data, self.request)

    def watching(self, net: str | None) -> Callable[[], None]:
        """A step with this perceptual net."""
        measure = None
        if net is not None:
            weights = None if net == "embedded" else "random"
            values = {"net": net, "weights": weights}
            loss = self.settings.loss.model_dump() | {"perceptual": values}
            changed = self.settings.model_dump() | {"loss": loss}
            measure = load_perceptual(FinetuneSection.model_validate(changed), self.device)

        def step() -> None:
            self.step.perceptual = [measure]
            self.take()

        return step

    def bare(self) -> Callable[[], None]:
        step, trainable = self.assembled()
        net, model = step.student.net, self.model
        size, geometry, device = model.micro_batch, model.geometry, self.device
        cells = model.side * geometry.patch
        picture = torch.randn(size, geometry.pixel_channels, cells, cells, device=device)
        time_told = torch.full((size,), 0.5, device=device)
        words = {key: value.to(device) for key, value in self.data.words().items()}
        text = FAMILY.collate([words] * size)

        def forward() -> torch.Tensor:
            with torch.autocast(device.type, self.precision, enabled=self.precision is not None):
                return FAMILY.run(net, picture, time_told, text)

        def passes() -> None:
            forward().square().mean().backward()
            with as_reference(net):
                forward()
            for parameter in trainable.parameters.values():
                parameter.grad = None

        return passes

    def seconds(self, action: Callable[[], None]) -> tuple[float, float]:
        """(what counts, wall)."""
        self.wait()
        wall, busy = time.perf_counter(), time.process_time()
        action()
        self.wait()
        wall, busy = time.perf_counter() - wall, time.process_time() - busy
        return (wall if self.device.type == "cuda" else busy), wall

    def wait(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize()


# ---- measurements, each in a process of its own --------------------------------------------------


def overhead(name: str, nets: list[str], rounds: int, folder: Path) -> dict[str, Any]:
    bench = Bench(name, "lora", 0, dist.discover(), folder)
    actions = {"bare": bench.bare(), "step": bench.watching(None)}
    actions |= {f"step with {net}": bench.watching(net) for net in nets}

    def measured() -> None:
        bench.step.perceptual = [None]
        bench.take(MEASURED_STEP)

    actions["measured step"] = measured
    for action in actions.values():
        action()
    taken: dict[str, list[tuple[float, float]]] = {key: [] for key in actions}
    for _ in range(rounds):
        for key, action in actions.items():
            taken[key].append(bench.seconds(action))
    medians = {key: statistics.median(one for one, _ in runs) for key, runs in taken.items()}
    return {
        "model": name,
        "parameters": sum(p.numel() for p in bench.step.student.net.parameters()),
        "trained": bench.num_trained,
        "micro batch": bench.model.micro_batch,
        "tokens": bench.model.side**2,
        "rounds": rounds,
        "seconds": {key: round(value, 4) for key, value in medians.items()},
        "wall seconds": {
            key: round(statistics.median(wall for _, wall in runs), 4)
            for key, runs in taken.items()
        },
        "over bare": {key: round(value / medians["bare"] - 1, 4) for key, value in medians.items()},
        "measuring, over a step": round(medians["measured step"] / medians["step"] - 1, 4),
    }


def memory(name: str, way: str, stage: int, rounds: int, folder: Path) -> dict[str, Any]:
    bench = Bench(name, way, stage, dist.discover(), folder)
    begun = peak_of_process()
    bench.take()
    taken = [bench.seconds(bench.take) for _ in range(rounds)]
    on_gpu = bench.device.type == "cuda"
    peak = torch.cuda.max_memory_allocated() if on_gpu else peak_of_process()
    return {
        "model": name,
        "way": way,
        "stage": stage,
        "ranks": bench.ranks.world,
        "rounds": rounds,
        "peak MiB": round(peak / 2**20),
        "peak MiB before the first step": round(begun / 2**20),
        "seconds per step": round(statistics.median(one for one, _ in taken), 4),
        "wall seconds per step": round(statistics.median(wall for _, wall in taken), 4),
        "samples per step": bench.settings.batch,
    }


def in_processes(words: list[str], ranks: int, folder: Path) -> dict[str, Any]:
    """What rank 0 of a measurement says."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    common = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": str(ranks)}
    processes = [
        subprocess.Popen(
            [sys.executable, "-m", "benchmarks.train_step", "--in", str(folder), *words],
            env={**os.environ, **common, "RANK": str(rank), "LOCAL_RANK": str(rank)},
            stdout=subprocess.PIPE,
            text=True,
        )
        for rank in range(ranks)
    ]
    said = [process.communicate()[0] for process in processes]
    assert not any(process.returncode for process in processes), words
    found: dict[str, Any] = json.loads(said[0].splitlines()[-1])
    print(json.dumps(found), flush=True)
    return found


def machine() -> dict[str, Any]:
    return {
        "cores": os.cpu_count(),
        "threads per process": 1,
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "torch": torch.__version__,
    }


def everything(use: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """What was asked for; what an earlier call measured stays."""
    rounds = ["--rounds", str(use.rounds)]
    found = json.loads(RESULTS.read_text()) if RESULTS.exists() else {}
    found["machine"] = machine()
    for name in use.models:
        words = ["--only", "overhead", name, "--perceptual", *use.perceptual, *rounds]
        found[f"overhead, {name}"] = in_processes(words, 1, folder)
    ways = [] if use.no_memory else WAYS
    for way, stage, ranks in ways:
        if torch.cuda.is_available() and ranks > torch.cuda.device_count():
            continue
        words = ["--only", "memory", "large", way, str(stage), *rounds]
        found[f"{way}, ZeRO {stage}, {ranks} ranks"] = in_processes(words, ranks, folder)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--models", nargs="*", choices=list(BUILD), default=list(BUILD))
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--perceptual", nargs="*", default=["embedded", "alex"])
    parser.add_argument("--no-memory", action="store_true")
    parser.add_argument("--only", nargs="+", help=argparse.SUPPRESS)
    parser.add_argument("--in", dest="folder", type=Path, help=argparse.SUPPRESS)
    use = parser.parse_args()
    if use.only:
        torch.set_num_threads(1)
        what, name, *rest = use.only
        if what == "overhead":
            found = overhead(name, use.perceptual, use.rounds, use.folder)
        else:
            found = memory(name, rest[0], int(rest[1]), use.rounds, use.folder)
        print(json.dumps(found), flush=True)
        dist.end_process(0)
    with tempfile.TemporaryDirectory() as folder:
        results = everything(use, Path(folder))
    RESULTS.write_text(json.dumps(results, indent=2) + "\n")


if __name__ == "__main__":
    main()
