"""Validation: the loss of held-out samples, with fixed noise at fixed noise levels.

Which samples, which noise and which levels depends on nothing but their keys and the recipe, so
that two numbers differ because the weights do: over the steps, over resumes, over ranks.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from asymlift.artifacts.lifted_folder import Lifted
from asymlift.data.feed import read_sample
from asymlift.data.order import derive
from asymlift.data.pictures import image_to_float
from asymlift.data.reader import Reader
from asymlift.data.records import TEXT, BadSample, Record
from asymlift.errors import BadData
from asymlift.families.base import Family
from asymlift.maths.patches import image_to_tokens
from asymlift.maths.schedule import middles
from asymlift.model.batch import BatchMaker, Embedding
from asymlift.model.evaluating import evaluating
from asymlift.model.held_out import FLOW, PERCEPTUAL, held_out_losses
from asymlift.model.noise_levels import NoiseLevels
from asymlift.model.training_step import TrainingStep
from asymlift.recipe import Recipe, ValidationSection
from asymlift.runtime import dist, watch
from asymlift.runtime.dist import Ranks
from asymlift.runtime.log import warn
from asymlift.runtime.metrics import read_metrics
from asymlift.stages.finetune.data import (
    Encoders,
    ExactData,
    StreamData,
    open_exact,
    to_cpu,
)
from asymlift.stages.finetune.journal import METRICS

NAMED = 3  # samples that a warning names
LOSS = "validation_loss"


@dataclass(frozen=True)
class HeldOut:
    """A sample in memory."""

    key: str
    image: Tensor  # (3, H, W) uint8
    text: Embedding


def is_unmeasured(recipe: Recipe, step: int) -> bool:
    """Whether a step's numbers are due and not written: a stop saves at once, and measures not."""
    use, last = recipe.finetune.validation, recipe.finetune.steps
    if use is None or step > last or (step % use.every and step != last):
        return False
    metrics = recipe.run_folder / METRICS
    lines = read_metrics(metrics) if metrics.is_file() else []
    return not any(line["step"] == step and LOSS in line for line in lines)


class Validation:
    """Reads the samples once, and measures them again and again. Every rank has to call."""

    def __init__(
        self,
        recipe: Recipe,
        use: ValidationSection,
        lifted: Lifted,
        family: Family,
        ranks: Ranks,
        training: ExactData | StreamData,
        encoders: Encoders,
    ) -> None:
        settings = recipe.finetune
        self.every, self.levels, self.chunk = use.every, use.levels, settings.micro_batch
        self.seed, self.drawn = settings.seed, NoiseLevels(settings.time, settings.batch)
        self.lifted, self.family, self.ranks, self.encoders = lifted, family, ranks, encoders
        data = opened(recipe, lifted, family, ranks)
        self.refuse_trained_on(data, training)
        self.reader = Reader(recipe.data.caption.source, cached=(TEXT,) if data.reads_text else ())
        self.data = data
        self.mine: list[HeldOut] = []  # sample r, r + world, ...: as many on every rank
        self.count = self.read_all(data.catalog.lowest_hashes(use.samples))
        if self.count < use.samples and ranks.first:
            warn(f"validation: {self.count} samples, finetune.validation asks for {use.samples}")

    @classmethod
    def begin(
        cls,
        recipe: Recipe,
        lifted: Lifted,
        family: Family,
        ranks: Ranks,
        training: ExactData | StreamData,
        encoders: Encoders,
    ) -> Validation | None:
        """Read and encode while the encoders are loaded; None if it is not wanted."""
        use = recipe.finetune.validation
        if use is None:
            return None
        return cls(recipe, use, lifted, family, ranks, training, encoders)

    def is_due(self, step: int, last: int) -> bool:
        return step % self.every == 0 or step == last

    # ---- samples -------------------------------------------------------------------------------

    def refuse_trained_on(self, data: ExactData, training: ExactData | StreamData) -> None:
        if not isinstance(training, ExactData):
            return
        trained = {source.path.resolve() for source in training.catalog.sources}
        for source in data.catalog.sources:
            if source.path.resolve() in trained:
                raise BadData(
                    f"data.validation: {source.path} is in data.train too; give it samples that "
                    "are not trained on, or leave finetune.validation out"
                )
        both = set(data.catalog.keys()).intersection(training.catalog.keys())
        if both and self.ranks.first:
            some = ", ".join(sorted(both)[:NAMED])
            warn(
                f"data.validation: {len(both)} keys are in data.train too ({some}); if these are "
                "the same pictures, the validation loss says what was learnt by heart"
            )

    def read_all(self, records: list[Record]) -> int:
        """Rank 0 reads and encodes one sample after the other, and each rank keeps its share."""
        count, faults = 0, list[str]()
        first: HeldOut | None = None
        for record in records:
            watch.going_on(f"validation sample {record.key}")
            sample, fault = dist.first_does(self.ranks, partial(self.read, record))
            if sample is None:
                faults.append(fault)
                continue
            first = first or sample
            if count % self.ranks.world == self.ranks.rank:
                self.mine.append(sample)
            count += 1
        if first is None:
            raise BadData("\n".join(["data.validation: no sample can be used", *faults[:2]]))
        if faults and self.ranks.first:
            warn(f"validation: {len(faults)} samples left out: {'; '.join(faults[:NAMED])}")
        # As many forward passes on every rank, or they would part ways inside ZeRO-3.
        self.mine += [first] * (-(-count // self.ranks.world) - len(self.mine))
        return count

    def read(self, record: Record) -> tuple[HeldOut | None, str]:
        """A sample, or why it cannot be used."""
        check = self.data.check(self.family, self.lifted.geometry, self.encoders.null_text)
        choice = self.data.recipe.data.caption.choice
        found = read_sample(self.reader, record, check, choice, self.seed, 0)
        if isinstance(found, BadSample):
            return None, str(found)
        text = found.text or self.encoders.captions([found.caption])[0]
        return HeldOut(found.key, found.image, to_cpu(text)), ""

    # ---- numbers -------------------------------------------------------------------------------

    @torch.no_grad()
    def measure(self, step: TrainingStep, maker: BatchMaker) -> dict[str, Any]:
        """The numbers of the weights as they are now, for metrics.jsonl."""
        with evaluating(step):
            losses = self.all_losses(step, maker)
        found: dict[str, Any] = {
            LOSS: float(losses[FLOW].mean()),
            "validation_by_level": losses[FLOW].mean(0).tolist(),
            "validation_sigma": [round(float(s), 4) for s in self.sigmas(self.mine[0].image)],
        }
        if PERCEPTUAL in losses:
            found["validation_perceptual"] = float(losses[PERCEPTUAL].mean())
        return found

    def all_losses(self, step: TrainingStep, maker: BatchMaker) -> dict[str, Tensor]:
        """Each term of every (sample, level), in float64, the same on every rank."""
        tables: dict[str, Tensor] = {}
        for number, sample in enumerate(self.mine):
            watch.going_on(f"validation sample {sample.key}")
            position = self.ranks.rank + self.ranks.world * number
            for name, values in self.losses(step, maker, sample).items():
                if name not in tables:
                    shape = self.count, self.levels
                    tables[name] = torch.zeros(shape, dtype=torch.float64, device=values.device)
                if position < self.count:
                    tables[name][position] = values.double()
        # One rank has each number and the others zero: the sum is exact, in any order.
        together = dist.summed(torch.stack(list(tables.values()))).cpu()
        return dict(zip(tables, together, strict=True))

    def losses(self, step: TrainingStep, maker: BatchMaker, sample: HeldOut) -> dict[str, Tensor]:
        """(levels,) of each term: the levels of one sample make batches of one size."""
        patch, device = self.lifted.geometry.pixel_patch, maker.device
        height, width = sample.image.shape[-2:]
        grid = (height // patch, width // patch)
        image = image_to_float(sample.image.to(device)).unsqueeze(0)
        x0 = image_to_tokens(self.lifted.color.encode(image), patch)
        text, sigmas = maker.alike(sample.text), self.sigmas(sample.image).to(device)
        parts: dict[str, list[Tensor]] = {}
        for start in range(0, self.levels, self.chunk):
            sigma = sigmas[start : start + self.chunk]
            eps = torch.stack([self.noise(sample.key, start + i, x0[0]) for i in range(len(sigma))])
            batch = self.family.collate([text] * len(sigma))
            clean = x0.expand(len(sigma), -1, -1)
            for name, values in held_out_losses(step, clean, eps, sigma, batch, grid).items():
                parts.setdefault(name, []).append(values)
        return {name: torch.cat(values) for name, values in parts.items()}

    def noise(self, key: str, level: int, like: Tensor) -> Tensor:
        seed = derive(self.seed, "validation", key, level)
        generator = torch.Generator(like.device).manual_seed(seed)
        return torch.randn(like.shape, generator=generator, device=like.device)

    def sigmas(self, image: Tensor) -> Tensor:
        """(levels,) float32, rising: the middles of equal shares of those that are trained on."""
        height, width = image.shape[-2:]
        shift = self.drawn.shift((height, width))
        return self.drawn.levels(middles(self.levels), shift).sort().values.float()


def opened(recipe: Recipe, lifted: Lifted, family: Family, ranks: Ranks) -> ExactData:
    """`data.validation`, read and checked as training data is."""
    assert recipe.data.validation is not None, "the recipe has been checked"
    change = {"train": recipe.data.validation, "mode": "exact"}
    data = recipe.data.model_copy(update=change)
    return open_exact(recipe.model_copy(update={"data": data}), lifted, family, ranks)
