"""What a finetune trains on: the samples, what is not cached of them, and a ledger of bad ones."""

import hashlib
import json
from collections import Counter
from collections.abc import Callable, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from asymlift.artifacts.lifted_folder import Lifted
from asymlift.data.feed import StepSamples
from asymlift.data.pairs import PairReader
from asymlift.data.shards import LATENT, BadSample, Sample, SampleIndex, expand, index_shards
from asymlift.errors import BadData
from asymlift.families.base import Family, Geometry
from asymlift.maths.schedule import draw_sigma, draw_sigma_mode, draw_sigma_uniform
from asymlift.model.batch import BatchMaker, Embedding
from asymlift.model.loading import load_pipeline
from asymlift.recipe import FinetuneSection, Recipe, TimeSection
from asymlift.runtime import dist
from asymlift.runtime.dist import Ranks
from asymlift.runtime.log import warn
from asymlift.stages.basis_statistics import check_budget
from asymlift.stages.fit_basis import check_pairing

MIN_SEEN = 1000  # before that many samples, the share of bad ones says little
MOST_TRIED = 16  # cached latents that are looked at to find a few that can be compared
NAMED = 3  # faults that are named on the screen, per reason; all of them go to logs/


def grid_of(index: SampleIndex, patch: int) -> tuple[int, int]:
    """Token rows and columns of a sample."""
    return index.height // patch, index.width // patch


def index_training_data(
    recipe: Recipe, lifted: Lifted
) -> tuple[list[SampleIndex], list[tuple[int, int]]]:
    """Every sample that can be trained on, with its token rows and columns."""
    patch, faults = lifted.geometry.pixel_patch, list[BadSample]()
    shards = index_shards(expand(recipe.data.train), on_bad=faults.append)
    samples = []
    for sample in (sample for shard in shards for sample in shard.samples):
        if min(grid_of(sample, patch)) > 0:
            samples.append(sample)
        else:
            size = f"{sample.width} x {sample.height}, a patch has {patch} x {patch}"
            unreadable = sample.width == 0
            reason = "image cannot be read" if unreadable else "smaller than one patch"
            faults.append(BadSample(sample.where, reason, "" if unreadable else size))
    for fault in faults[:NAMED]:
        warn(f"{fault}; left out")
    if len(faults) > NAMED:
        warn(f"{len(faults)} samples are left out in all")
    check_budget(faults, len(samples) + len(faults), recipe.data.max_bad_fraction)
    if not samples:
        raise BadData(f"{recipe.data.train}: there are no samples in these shards")
    return samples, [grid_of(sample, patch) for sample in samples]


def data_digest(samples: Sequence[SampleIndex], grids: Sequence[tuple[int, int]]) -> str:
    """Which samples, in which order, of which size: all that the order of training depends on."""
    digest = hashlib.sha256()
    for sample, grid in zip(samples, grids, strict=True):
        digest.update(f"{sample.key} {grid}\n".encode())
    return f"sha256:{digest.hexdigest()}"


def check_sample(
    index: SampleIndex,
    sample: Sample,
    *,
    family: Family,
    geometry: Geometry,
    null_text: Embedding | None,
) -> None:
    """Raise BadSample where a sample does not fit the model; None: the text is made online."""
    if null_text is not None:
        if sample.text is None:
            raise BadSample(
                index.where, "no text embedding", "data.text: online encodes it while training"
            )
        try:
            family.collate([shapes_of(null_text), shapes_of(sample.text)])
        except BadData as error:
            detail = str(error).replace("sample 0", "the empty prompt").splitlines()[0]
            raise BadSample(index.where, "text embedding does not fit", detail) from None
    if sample.latent is None:
        return
    rows, columns = grid_of(index, geometry.pixel_patch)
    expected = (geometry.channels, rows * geometry.patch, columns * geometry.patch)
    if tuple(sample.latent.shape) != expected:
        raise BadSample(
            index.where,
            "latent has the wrong shape",
            f"{tuple(sample.latent.shape)}, the image needs {expected}",
        )


def shapes_of(embedding: Embedding) -> Embedding:
    return {name: tensor.to("meta") for name, tensor in embedding.items()}


class Ledger:
    """Bad samples: counted over all ranks, named, written down, and too many end the run."""

    def __init__(self, folder: Path, rank: int, max_fraction: float) -> None:
        self.path = folder / "logs" / f"skipped-{rank}.jsonl"
        self.max_fraction = max_fraction
        self.num_seen, self.num_bad = 0, 0  # all ranks
        self.reasons = Counter[str]()  # this rank

    def note(self, read: StepSamples, num_good: int, num_bad: int) -> None:
        """Take in one step: what this rank read, and the counts of all ranks."""
        self.num_seen += num_good + num_bad
        self.num_bad += num_bad
        for fault in read.faults:
            self.reasons[fault.reason] += 1
            if self.reasons[fault.reason] <= NAMED:
                warn(f"{fault}; left out")
        if read.faults:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            with self.path.open("a", encoding="utf-8") as file:
                for fault in read.faults:
                    line = {"sample": fault.where, "reason": fault.reason, "detail": fault.detail}
                    file.write(json.dumps(line) + "\n")
        if self.num_bad > self.max_fraction * max(self.num_seen, MIN_SEEN):
            here = "; ".join(str(fault) for fault in read.faults[:NAMED]) or "read by another rank"
            raise BadData(
                f"{self.num_bad} of {self.num_seen} samples are bad, more than "
                f"data.max_bad_fraction {self.max_fraction:g} allows: {here}\n"
                f"all of them are listed in {self.path.parent}"
            )


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
        samples: Sequence[SampleIndex],
    ) -> None:
        self.lifted, self.family, self.recipe = lifted, family, recipe
        self.ranks, self.device = ranks, device
        self.text_online = recipe.data.text == "online"
        self.latents_online = any(LATENT not in sample.members for sample in samples)
        self.pipeline: Any = None
        if self.stay:
            dist.all_do(ranks, self.load)
        else:
            dist.first_does(ranks, self.load)
        self.null_text = self.for_all([""])[0]
        dist.first_does(ranks, lambda: self.check_latents(samples))

    def load(self) -> None:
        self.pipeline = load_pipeline(self.lifted.folder)
        for part in self.pipeline.components.values():
            if isinstance(part, torch.nn.Module):
                part.to(self.device)

    def check_latents(self, samples: Sequence[SampleIndex]) -> None:
        """Compare a few cached latents with what this model's VAE makes of their images."""
        geometry = self.lifted.geometry
        pairs = PairReader(
            self.lifted.color.space,
            geometry.pixel_patch,
            geometry.channels,
            geometry.patch,
            encode=lambda image: self.latents(image.to(self.device)).float().cpu(),
        )
        cached = (sample for sample in samples if LATENT in sample.members)
        check_pairing(pairs, list(islice(cached, MOST_TRIED)))

    @property
    def stay(self) -> bool:
        """Whether training itself needs them."""
        return self.text_online or self.latents_online

    def for_all(self, prompts: list[str]) -> list[Embedding]:
        """Embeddings that rank 0 makes and every rank gets. Every rank has to call."""
        return dist.first_does(self.ranks, lambda: [to_cpu(one) for one in self.captions(prompts)])

    @torch.no_grad()
    def captions(self, prompts: list[str]) -> list[Embedding]:
        if not prompts:
            return []
        return self.family.encode_prompt(self.pipeline, prompts, self.recipe.model.text_length)

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
            draw_sigma=sigma_drawer(settings.time, self.device),
            encode_latents=self.latents if self.latents_online else None,
            encode_captions=self.captions if self.text_online else None,
        )

    def let_go(self) -> None:
        """Keep only what training itself needs."""
        if not self.stay:
            self.pipeline = None


def to_cpu(embedding: Embedding) -> Embedding:
    return {name: tensor.cpu() for name, tensor in embedding.items()}


def sigma_drawer(use: TimeSection, device: torch.device) -> Callable[[torch.Generator], Tensor]:
    def draw(generator: torch.Generator) -> Tensor:
        if use.kind == "logit_normal":
            normal = torch.randn((), generator=generator, device=device)
            return draw_sigma(normal, shift=use.shift, mean=use.mean, std=use.std)
        uniform = torch.rand((), generator=generator, device=device)
        if use.kind == "uniform":
            return draw_sigma_uniform(uniform, shift=use.shift)
        return draw_sigma_mode(uniform, shift=use.shift, scale=use.mode_scale)

    return draw
