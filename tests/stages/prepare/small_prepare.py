"""Pictures to prepare, the recipe that prepares them, and what a shard must say of them."""

import io
import json
import tarfile
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from asymlift.data.packing import unpack
from asymlift.data.pictures import decode_image, image_to_float
from asymlift.model.loading import load_pipeline
from asymlift.recipe import Recipe, check_recipe
from asymlift.report.prepare_report import PrepareReport
from asymlift.stages.prepare.run import Share, prepare
from asymlift.stages.verbs import base_folder, family_of, prepare_job

RESIZE: dict[str, Any] = {"resize": {"sides": [32]}}
WORDS = ("red", "teal", "blue", "green", "yellow")


def recipe_for(
    folder: Path, source: Any = None, *, data: dict[str, Any] | None = None, **settings: Any
) -> Recipe:
    """Prepare `source` (FOLDER/source) into FOLDER/out: buckets around 32 x 32, 8 to a shard."""
    return check_recipe(values_for(folder, source, data=data, **settings), "small recipe")


def values_for(
    folder: Path, source: Any = None, *, data: dict[str, Any] | None = None, **settings: Any
) -> dict[str, Any]:
    if isinstance(source, list):
        source = [str(path) for path in source]
    return {
        "name": "small",
        "runs": str(folder / "runs"),
        "model": {"base": "embedded:tiny", "text_length": 12},
        "data": {"train": "unused", "workers": 2, **(RESIZE if data is None else data)},
        "prepare": {
            "source": source if isinstance(source, list) else str(source or folder / "source"),
            "out": str(folder / "out"),
            "shard_samples": 8,
            **settings,
        },
    }


def run(
    recipe: Recipe,
    number: int = 0,
    of: int = 1,
    *,
    together: bool = False,
    overwrite: bool = False,
) -> PrepareReport:
    """As the command does it, but without its signal handlers: also in a thread."""
    return prepare(prepare_job(recipe), Share(number, of, together=together), overwrite=overwrite)


def draw(number: int, width: int = 40, height: int = 36) -> np.ndarray:
    """Smooth, and unlike any other."""
    coarse = np.random.default_rng(number).integers(20, 235, (4, 4, 3), dtype=np.uint8)
    picture = Image.fromarray(coarse).resize((width, height), Image.Resampling.BICUBIC)
    return np.asarray(picture)


def encoded(array: np.ndarray, kind: str = "PNG", **options: Any) -> bytes:
    stream = io.BytesIO()
    Image.fromarray(array).save(stream, kind, **options)
    return stream.getvalue()


def make_folder(folder: Path, count: int = 20, *, captions: bool = True) -> Path:
    """Pictures of many sizes, all of which can be used; every fifth has the caption of another."""
    folder.mkdir(parents=True, exist_ok=True)
    for number in range(count):
        width, height = 34 + number * 7 % 25, 34 + number * 5 % 25
        (folder / f"{number:03d}.png").write_bytes(encoded(draw(number, width, height)))
        if captions:
            (folder / f"{number:03d}.txt").write_text(caption_of(number))
    return folder


def caption_of(number: int) -> str:
    return f"a {WORDS[number % 5]} disc on {WORDS[number // 2 % 5]}"


def shards(out: Path) -> list[Path]:
    return sorted(out.glob("*.tar"))


def members(out: Path) -> dict[str, dict[str, bytes]]:
    """key -> suffix -> bytes, of every shard in order, by nothing but tarfile."""
    found: dict[str, dict[str, bytes]] = {}
    for path in shards(out):
        with tarfile.open(path) as tar:
            for member in tar:
                key, _, suffix = member.name.partition(".")
                file = tar.extractfile(member)
                assert file is not None
                found.setdefault(key, {})[f".{suffix}"] = file.read()
    return found


def content(out: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(out.iterdir())}


def image_in(sample: dict[str, bytes]) -> Tensor:
    (data,) = [d for suffix, d in sample.items() if suffix in (".png", ".jpg", ".webp")]
    return decode_image(data)


@cache
def base() -> tuple[Any, Any]:
    """The embedded family and pipeline."""
    folder = base_folder(check_recipe({"name": "x", **BASE}, "base"))
    family, _ = family_of(check_recipe({"name": "x", **BASE}, "base"), folder)
    return family, load_pipeline(folder)


BASE: dict[str, Any] = {"model": {"base": "embedded:tiny"}, "data": {"train": "unused"}}


@torch.inference_mode()
def check_sample(sample: dict[str, bytes], prompts: list[str]) -> None:
    """The latent is that of the stored picture, the embeddings are those of the prompts."""
    family, pipeline = base()
    image = image_to_float(image_in(sample))[None]
    latent = unpack(sample[".latent.safetensors"])["latent"]
    assert latent.dtype == torch.float16
    wanted = family.encode_latents(pipeline.vae, image)[0]
    torch.testing.assert_close(latent.float(), wanted, rtol=1e-3, atol=1e-3)
    for number, prompt in enumerate(prompts):
        suffix = f".text{number or ''}.safetensors"
        stored = unpack(sample[suffix])
        (embedding,) = family.encode_prompt(pipeline, [prompt], 12)
        assert stored.keys() == embedding.keys()
        for name, tensor in embedding.items():
            assert stored[name].dtype == torch.bfloat16
            torch.testing.assert_close(stored[name].float(), tensor, rtol=1e-2, atol=1e-3)
    assert f".text{len(prompts)}.safetensors" not in sample


def facts_of(sample: dict[str, bytes]) -> dict[str, Any]:
    facts: dict[str, Any] = json.loads(sample[".json"])
    return facts


def rejected(out: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (out / "rejected.jsonl").read_text().splitlines()]
