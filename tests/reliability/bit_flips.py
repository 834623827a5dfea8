"""One of each kind of artifact, small, and single bits that flip in their files."""

import random
import shutil
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from asymlift.artifacts.checkpoint import committing
from asymlift.artifacts.manifest import write_manifest
from asymlift.artifacts.safetensors_stream import save_tensors
from asymlift.data.writer import write_shard
from asymlift.stages.convert import convert
from asymlift.stages.verify import SHARDS, Verdict, verify
from tests.data.small_shards import make_sample
from tests.reliability.fake_pipeline import fake_plan


@dataclass(frozen=True)
class Artifacts:
    """What `verify` is given, by name; the files of each."""

    paths: dict[str, Path]

    def files(self, name: str) -> list[Path]:
        path = self.paths[name]
        return [path] if path.is_file() else sorted(p for p in path.rglob("*") if p.is_file())


def make_artifacts(folder: Path) -> Artifacts:
    """A basis, a lifted model without hard links, a checkpoint, and prepared shards."""
    plan = fake_plan(folder)
    convert(plan)
    lifted = shutil.copytree(plan.output, folder / "copy")
    generator = torch.Generator().manual_seed(0)
    with committing(folder / "checkpoints", 7, {"parameters": [], "updates": 7}) as staged:
        for name in ("trainable", "ema", "optimizer"):
            tensors = {f"{name}.{n}": torch.randn(8, 16, generator=generator) for n in range(3)}
            save_tensors(staged / f"{name}.safetensors", tensors)
    shards = folder / "shards"
    for name in range(2):
        samples = (make_sample(3 * name + n) for n in range(3))
        write_shard(shards / f"{name:06d}.tar", samples, made={"vae": "sha256:0"})
    (shards / "rejected.jsonl").write_text('{"sample": "a.png", "reason": "empty file"}\n')
    write_manifest(shards, kind=SHARDS, facts={})  # last, as `prepare` does
    return Artifacts(
        {
            "basis": plan.basis,
            "lifted": Path(lifted),
            "checkpoint": folder / "checkpoints/step-000007",
            "shards": shards,
        }
    )


def with_flipped_bit(artifacts: Artifacts, name: str, path: Path, dice: random.Random) -> Verdict:
    """What `verify` finds; the file is whole again afterwards."""
    good = path.read_bytes()
    bit = dice.randrange(8 * len(good))
    damaged = bytearray(good)
    damaged[bit // 8] ^= 1 << bit % 8
    path.write_bytes(damaged)
    try:
        return verify(artifacts.paths[name])
    finally:
        path.write_bytes(good)


def flip_everywhere(artifacts: Artifacts, flips: int, seed: int) -> dict[str, Any]:
    """Bits drawn evenly over the files of each kind: half by size, half by file."""
    dice, missed, tried = random.Random(seed), Counter[str](), Counter[str]()
    names = list(artifacts.paths)
    for number in range(flips):
        name = names[number % len(names)]
        files = artifacts.files(name)
        by_size = [path.stat().st_size for path in files] if number // len(names) % 2 else None
        (path,) = dice.choices(files, weights=by_size)
        verdict = with_flipped_bit(artifacts, name, path, dice)
        tried[name] += 1
        if verdict.ok or not any(path.name in problem for problem in verdict.problems):
            missed[f"{name}: {path.name}"] += 1
    return {
        "flips": tried.total(),
        "found and named": tried.total() - missed.total(),
        "per artifact": dict(tried),
        "files": {name: len(artifacts.files(name)) for name in names},
        "missed": dict(missed),
    }
