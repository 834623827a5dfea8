"""What a finetune trains on: the samples, and what is not cached of them."""

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from itertools import islice
from typing import Any

import numpy as np
import torch
from torch import Tensor

from asymlift.artifacts.diffusers_folder import DiffusersFolder
from asymlift.artifacts.lifted_folder import Lifted
from asymlift.artifacts.manifest import digest_json, read_manifest
from asymlift.data.buckets import Fit, buckets
from asymlift.data.catalog import Catalog, expand
from asymlift.data.feed import Check, ExactFeed, Feed, StepSamples
from asymlift.data.order import Order, share_of
from asymlift.data.pairs import PairReader, check_latent
from asymlift.data.reader import Reader
from asymlift.data.records import LATENT, TEXT, BadSample, OnBad, Record, Sample
from asymlift.data.stream import GUARANTEE, Stream, StreamFeed, expand_urls
from asymlift.errors import BadData, BadRecipe
from asymlift.families.base import Family, Geometry
from asymlift.model.batch import BatchMaker, Embedding
from asymlift.model.loading import embed_prompts, load_pipeline
from asymlift.model.noise_levels import NoiseLevels
from asymlift.recipe import DataSection, FinetuneSection, Recipe
from asymlift.runtime import dist
from asymlift.runtime.dist import Ranks
from asymlift.runtime.log import warn
from asymlift.stages.finetune.ledger import Ledger
from asymlift.stages.fit_basis import check_pairing
from asymlift.stages.open_data import check_origin, fit_of, open_data, tell_what_is_left_out
from asymlift.stages.sizes import Sizes

MOST_TRIED = 16  # cached latents that are looked at to find a few that can be compared


# ---- samples -----------------------------------------------------------------------------------


@dataclass(frozen=True)
class TrainingData(ABC):
    """Where the samples come from, and what has to be made of them while training."""

    recipe: Recipe
    digest: str
    reads_text: bool  # whether cached embeddings are used
    text_online: bool  # whether captions are encoded while training
    latents_online: bool

    def reader(self) -> Reader:
        cached = (LATENT, TEXT) if self.reads_text else (LATENT,)
        return Reader(self.recipe.data.caption.source, cached=cached)

    def check(self, family: Family, geometry: Geometry, null_text: Embedding) -> Check:
        """Whether a sample fits the model, given what is made of it while training."""
        return partial(
            check_sample,
            family=family,
            geometry=geometry,
            null_text=null_text,
            text_online=self.text_online,
        )

    def foreign_latents(self) -> Iterator[Record]:
        """Samples with a cached latent of which nobody says what made it."""
        return iter(())

    @abstractmethod
    def enter_faults(self, ledger: Ledger) -> None:
        """What was wrong before the first sample was read. Every rank has to call."""

    @abstractmethod
    def feed(self, ranks: Ranks, begin: int, check: Check, tell: Callable[[str], None]) -> Feed:
        """This rank's samples from a step on."""

    @abstractmethod
    def largest(self) -> tuple[int, int]:
        """(height, width) of the largest pictures that a step may have."""

    @abstractmethod
    def epoch(self, step: int, read: StepSamples) -> float:
        """How often all samples have been seen."""

    @abstractmethod
    def about(self) -> str:
        """How much there is, for the first line of a run."""


@dataclass(frozen=True)
class ExactData(TrainingData):
    """A catalog: every sample once an epoch, in an order that follows from seed and step."""

    catalog: Catalog
    order: Order

    def foreign_latents(self) -> Iterator[Record]:
        catalog = self.catalog
        unsaid = [n for n, source in enumerate(catalog.sources) if "vae" not in (source.made or {})]
        source_of = np.searchsorted(catalog.starts, catalog.chosen, side="right") - 1
        wanted = np.flatnonzero(catalog.has(LATENT) & np.isin(source_of, unsaid))
        return (catalog[index] for index in wanted.tolist())

    def enter_faults(self, ledger: Ledger) -> None:
        ledger.open(self.catalog)

    def feed(self, ranks: Ranks, begin: int, check: Check, tell: Callable[[str], None]) -> Feed:
        data, settings = self.recipe.data, self.recipe.finetune
        return ExactFeed(
            self.catalog,
            self.order,
            share_of(range(settings.batch), ranks.rank, ranks.world, settings.micro_batch),
            self.reader(),
            workers=data.workers,
            seed=settings.seed,
            choice=data.caption.choice,
            check=check,
            on_slow=tell,
        )

    def largest(self) -> tuple[int, int]:
        height, width = max(self.order.sizes.tolist(), key=math.prod)
        return height, width

    def epoch(self, step: int, read: StepSamples) -> float:
        return step / self.order.steps_per_epoch

    def about(self) -> str:
        epochs = self.recipe.finetune.steps / self.order.steps_per_epoch
        return f"{len(self.catalog):,} samples, {epochs:.1f} epochs"


@dataclass(frozen=True)
class StreamData(TrainingData):
    """Shards read from front to back; `GUARANTEE` says what that means."""

    urls: list[str]
    fit: Fit

    def foreign_latents(self) -> Iterator[Record]:
        """Nothing is said of a streamed shard, so the first of them has to serve."""
        stream = Stream(
            self.urls, self.fit, rank=0, world=1, seed=0, first_step=0, on_bad=lambda fault: None
        )
        first = islice(stream.shard(self.urls[0]), MOST_TRIED)
        return (record for record in first if LATENT in record.parts)

    def enter_faults(self, ledger: Ledger) -> None:
        pass  # nothing has been looked at

    def feed(self, ranks: Ranks, begin: int, check: Check, tell: Callable[[str], None]) -> Feed:
        data, settings = self.recipe.data, self.recipe.finetune

        def stream(on_bad: OnBad) -> Stream:
            return Stream(
                self.urls,
                self.fit,
                rank=ranks.rank,
                world=ranks.world,
                seed=settings.seed,
                first_step=begin,
                on_bad=on_bad,
                on_note=tell,
            )

        return StreamFeed(
            stream,
            self.reader(),
            micro_batch=settings.micro_batch,
            accumulation=settings.batch // (settings.micro_batch * ranks.world),
            workers=data.workers,
            seed=settings.seed,
            choice=data.caption.choice,
            check=check,
            on_slow=tell,
        )

    def largest(self) -> tuple[int, int]:
        return max((size for some in buckets(self.fit).values() for size in some), key=math.prod)

    def epoch(self, step: int, read: StepSamples) -> float:
        return float(read.epoch)

    def about(self) -> str:
        return f"{len(self.urls):,} shards, streamed"


def open_training_data(
    recipe: Recipe, lifted: Lifted, family: Family, ranks: Ranks
) -> ExactData | StreamData:
    """What `data.train` names, the same on every rank. Every rank has to call."""
    if recipe.data.mode == "stream":
        return open_stream(recipe, lifted, ranks)
    return open_exact(recipe, lifted, family, ranks)


def sizes_of_lifted(lifted: Lifted, family: Family) -> Sizes:
    return Sizes.of(DiffusersFolder(lifted.folder), family, lifted.geometry)


def may_keep_sizes(data: DataSection) -> bool:
    """Whether all of it is in shards, which may have been prepared."""
    return data.mode != "stream" and not expand(data.train).listings


def open_stream(recipe: Recipe, lifted: Lifted, ranks: Ranks) -> StreamData:
    """Nothing is looked at before it is needed, so everything may have to be made."""
    data = recipe.data
    urls = dist.first_does(ranks, lambda: expand_urls(data.train))
    if data.cache is not None:
        raise BadRecipe("data.cache: needs shards that are read in any order, not data.mode stream")
    if ranks.first:
        warn(GUARANTEE)
    return StreamData(
        recipe,
        digest_json(sorted(urls)),
        reads_text=data.text != "online",
        text_online=data.text != "cached",
        latents_online=True,
        urls=urls,
        fit=fit_of(data.resize, lifted.geometry.pixel_patch),
    )


def open_exact(recipe: Recipe, lifted: Lifted, family: Family, ranks: Ranks) -> ExactData:
    """Everything that can be trained on, the same on every rank. Every rank has to call."""
    data = recipe.data
    catalog = open_data(data.train, data, lifted.geometry.pixel_patch, ranks)
    if ranks.first:
        tell_what_is_left_out(catalog)
    sizes = sizes_of_lifted(lifted, family)
    targets = np.unique(catalog.targets, axis=0).tolist()
    dist.first_does(ranks, lambda: sizes.check_stored(targets, str(data.train)))
    digest = catalog.digest()
    for rank, found in enumerate(dist.gathered(ranks, digest)):
        if found != digest:
            raise BadData(
                f"{data.train}: ranks {min(rank, ranks.rank)} and {max(rank, ranks.rank)} find "
                "different samples; every machine needs the same files"
            )
    reads_text = uses_embeddings(catalog, data)
    complete = reads_text and has_every_embedding(catalog, data)
    dist.first_does(ranks, lambda: check_made(catalog, recipe, lifted, family, reads_text))
    return ExactData(
        recipe,
        digest,
        reads_text=reads_text,
        text_online=data.text != "cached" and not complete,
        latents_online=not catalog.has(LATENT).all(),
        catalog=catalog,
        order=Order(catalog.targets, recipe.finetune.batch, recipe.finetune.seed),
    )


def uses_embeddings(catalog: Catalog, data: DataSection) -> bool:
    """Those of shards that were not prepared are of captions, so they do not serve for labels."""
    fits = data.caption.source == "caption" or all_prepared(catalog)
    if data.text == "cached" and not fits:
        raise BadData(
            f"{data.train}: its cached embeddings are of captions, and data.caption.source is "
            f"{data.caption.source}; prepare it with that source, or set data.text: online"
        )
    return fits and data.text != "online"


def has_every_embedding(catalog: Catalog, data: DataSection) -> bool:
    """Whether no caption that may be chosen has to be encoded: `prepare` caches all of them."""
    first_suffices = data.caption.choice == "first" or all_prepared(catalog)
    return first_suffices and bool(catalog.has(TEXT).all())


def all_prepared(catalog: Catalog) -> bool:
    return all(source.made is not None for source in catalog.sources)


def check_made(
    catalog: Catalog, recipe: Recipe, lifted: Lifted, family: Family, reads_text: bool
) -> None:
    """Refuse prepared data whose latents or embeddings another model made."""
    if catalog.made is None:
        return
    known = read_manifest(lifted.folder).files  # or gigabytes would be read at every start
    folder, wanted = DiffusersFolder(lifted.folder, known), dict[str, Any](family=family.name)
    if catalog.has(LATENT).any():
        wanted["vae"] = folder.fingerprint("vae")
    if reads_text and catalog.has(TEXT).any():
        has_encoder = family.has_text_encoder
        wanted["text encoders"] = folder.text_fingerprint(has_encoder=has_encoder)
        wanted["text length"] = recipe.model.text_length
        wanted["prompt"] = recipe.data.caption.source
    check_origin(catalog.made, wanted, recipe.data, str(recipe.data.train))


def check_sample(
    record: Record,
    sample: Sample,
    *,
    family: Family,
    geometry: Geometry,
    null_text: Embedding,
    text_online: bool,
) -> None:
    """Raise BadSample where a sample does not fit the model."""
    if sample.latent is not None:
        check_latent(record, sample.latent, sample.image.shape[-2:], geometry)
    if sample.text is not None:
        try:
            family.collate([shapes_of(null_text), shapes_of(sample.text)])
        except BadData as error:
            detail = str(error).replace("sample 0", "the empty prompt").splitlines()[0]
            raise BadSample(record.where, "text embedding does not fit", detail) from None
    elif not text_online:
        hint = "data.text: online encodes it while training"
        raise BadSample(record.where, "no text embedding", hint)


def shapes_of(embedding: Embedding) -> Embedding:
    return {name: tensor.to("meta") for name, tensor in embedding.items()}


# ---- what is not cached ------------------------------------------------------------------------


class Encoders:
    """The folder's text encoders and VAE: for the empty prompt, previews, and what is not cached.

    Where everything is cached only rank 0 loads them, and lets them go before training.
    """

    def __init__(
        self,
        lifted: Lifted,
        family: Family,
        recipe: Recipe,
        ranks: Ranks,
        device: torch.device,
        training: TrainingData,
    ) -> None:
        self.lifted, self.family, self.recipe = lifted, family, recipe
        self.ranks, self.device, self.training = ranks, device, training
        self.pipeline: Any = None
        if self.stay:
            dist.all_do(ranks, self.load)
        else:
            dist.first_does(ranks, self.load)
        self.null_text = self.for_all([""])[0]
        dist.first_does(ranks, self.check_latents)

    def load(self) -> None:
        self.pipeline = load_pipeline(self.lifted.folder, family=self.family)
        for part in self.pipeline.components.values():
            if isinstance(part, torch.nn.Module):
                part.to(self.device)

    def check_latents(self) -> None:
        """Compare a few cached latents with what this model's VAE makes of their images."""
        pairs = PairReader(
            self.lifted.color.space,
            self.lifted.geometry,
            encode=lambda image: self.latents(image.to(self.device)).float().cpu(),
        )
        check_pairing(pairs, list(islice(self.training.foreign_latents(), MOST_TRIED)))

    @property
    def stay(self) -> bool:
        """Whether training itself needs them."""
        return self.training.text_online or self.training.latents_online

    def for_all(self, prompts: list[str]) -> list[Embedding]:
        """Embeddings that rank 0 makes and every rank gets. Every rank has to call."""
        return dist.first_does(self.ranks, lambda: [to_cpu(one) for one in self.captions(prompts)])

    @torch.no_grad()
    def captions(self, prompts: list[str]) -> list[Embedding]:
        if not prompts:
            return []
        return embed_prompts(self.family, self.pipeline, prompts, self.recipe.model.text_length)

    @torch.no_grad()
    def latents(self, images: Tensor) -> Tensor:
        return self.family.encode_latents(self.pipeline.vae, images)

    def batch_maker(self, settings: FinetuneSection) -> BatchMaker:
        return BatchMaker(
            self.family,
            self.lifted.geometry,
            self.lifted.color,
            self.device,
            null_text=self.null_text,
            caption_dropout=self.recipe.data.caption_dropout,
            draw_sigma=NoiseLevels(settings.time, settings.batch),
            encode_latents=self.latents if self.training.latents_online else None,
            encode_captions=self.captions if self.training.text_online else None,
        )

    def let_go(self) -> None:
        """Keep only what training itself needs."""
        if not self.stay:
            self.pipeline = None


def to_cpu(embedding: Embedding) -> Embedding:
    return {name: tensor.cpu() for name, tensor in embedding.items()}
