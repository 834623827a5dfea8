"""What a plan can know of the data without reading a picture, and what will be written."""

import math
from dataclasses import dataclass
from pathlib import Path

from asymlift.artifacts.files import free_bytes
from asymlift.data.catalog import expand
from asymlift.data.records import LATENT
from asymlift.data.table import index_path
from asymlift.errors import UserError
from asymlift.recipe import FinetuneSection, Recipe
from asymlift.stages.finetune.data import has_every_embedding, uses_embeddings
from asymlift.stages.open_data import open_data
from asymlift.stages.plan.model import Blueprint

WIDTHS = {"none": 0, "float32": 4, "float16": 2, "bfloat16": 2, "float8": 1}


@dataclass(frozen=True)
class DataFacts:
    """Unknown is None."""

    note: str
    samples: int | None
    bytes_on_disk: int | None
    size: tuple[int, int] | None  # of the largest pictures
    text_online: bool
    latents_online: bool


def look_at_data(recipe: Recipe, patch: int) -> DataFacts:
    """By the indexes of shards that are here; nothing is indexed, measured or fetched."""
    try:
        return indexed_data(recipe, patch)
    except UserError as missing:
        return supposed(recipe, f"not looked at ({str(missing).splitlines()[0]})")


def indexed_data(recipe: Recipe, patch: int) -> DataFacts:
    data = recipe.data
    if data.mode == "stream":
        return supposed(recipe, "streamed: nothing is known before it is read", cached=False)
    named = expand(data.train)
    if named.listings and data.cache is None:
        return supposed(recipe, f"{named.listings[0]}: pictures, nothing is cached", cached=False)
    if named.listings or not all(index_path(shard).is_file() for shard in named.shards):
        return supposed(recipe, f"{data.train}: not indexed yet")
    catalog = open_data(data.train, data, patch)
    complete = uses_embeddings(catalog, data) and has_every_embedding(catalog, data)
    height, width = max(catalog.targets.tolist(), key=math.prod)
    return DataFacts(
        note=f"{data.train}",
        samples=len(catalog),
        bytes_on_disk=sum(shard.stat().st_size for shard in named.shards),
        size=(height, width),
        text_online=data.text != "cached" and not complete,
        latents_online=not catalog.has(LATENT).all(),
    )


def supposed(recipe: Recipe, note: str, *, cached: bool = True) -> DataFacts:
    """What the recipe leads to expect."""
    data, prepare = recipe.data, recipe.prepare
    text = data.text == "online" or (data.text == "auto" and not cached)
    latents = not cached
    if cached and prepare is not None:
        text = text or (data.text == "auto" and prepare.text == "none")
        latents = prepare.latents == "none"
    return DataFacts(note, None, None, None, text, latents)


@dataclass(frozen=True)
class Disk:
    """Bytes; what is not known is None."""

    checkpoint: int
    checkpoints: int  # how many there are at the end
    lifted: int | None
    cached_per_sample: int | None  # latents and embeddings that `prepare` would write
    free: int

    @property
    def all_checkpoints(self) -> int:
        return self.checkpoint * self.checkpoints


def disk_of(
    recipe: Recipe, blueprint: Blueprint, trained: int, state_bytes: float, size: tuple[int, int]
) -> Disk:
    """Checkpoints hold weights, average and moments in float32, whatever they were."""
    use = recipe.finetune
    moments = round(state_bytes * trained)
    average = 4 * trained if use.ema else 0
    return Disk(
        checkpoint=4 * trained + moments + average,
        checkpoints=num_checkpoints(use),
        lifted=sum(blueprint.file_bytes.values()) or None,
        cached_per_sample=cached_bytes(recipe, blueprint, size),
        free=free_bytes(Path(recipe.runs)),
    )


def num_checkpoints(use: FinetuneSection) -> int:
    """What is there at the end: the newest, and the milestones among all that were made."""
    every, last = use.checkpoint.every, use.steps
    made = sorted({*range(every, last + 1, every), last})
    kept = set(made[-use.checkpoint.keep :])
    if use.checkpoint.milestone is not None:
        kept |= {step for step in made if step % use.checkpoint.milestone == 0}
    return len(kept)


def cached_bytes(recipe: Recipe, blueprint: Blueprint, size: tuple[int, int]) -> int | None:
    if recipe.prepare is None:
        return None
    geometry, shapes = blueprint.geometry, blueprint.text_shapes(recipe.model.text_length)
    tokens = size[0] * size[1] // geometry.pixel_patch**2
    words = sum(math.prod(shape) for shape in shapes.values())
    return (
        tokens * geometry.d * WIDTHS[recipe.prepare.latents] + words * WIDTHS[recipe.prepare.text]
    )
