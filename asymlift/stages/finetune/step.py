"""One global batch of a finetune: read it, make its gradients, update, average.

A step is a pure function of the weights and its number: data order, noise, noise level, dropped
captions and adapter dropout follow from (seed, step, slot).
"""

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from asymlift.data.feed import Feed, StepSamples
from asymlift.data.order import derive, share_of
from asymlift.errors import UserError
from asymlift.maths.pace import karras_decay, learning_rate_factor
from asymlift.model.batch import BatchMaker, Place
from asymlift.model.ema import Ema
from asymlift.recipe import FinetuneSection
from asymlift.runtime import dist, watch
from asymlift.runtime.dist import Ranks
from asymlift.runtime.engine import Engine
from asymlift.runtime.signals import StopRequest
from asymlift.stages.finetune.data import TrainingData
from asymlift.stages.finetune.diagnostics import add, figures, on_host, over_ranks
from asymlift.stages.finetune.guard import Guard
from asymlift.stages.finetune.ledger import Ledger

ASKING = "ranks that are asked to stop"


@dataclass(frozen=True)
class Read:
    """What this rank has of a global batch, and what all ranks together have."""

    samples: StepSamples
    num_good: int  # of all ranks
    seconds: float  # that this rank waited


class Trainer:
    """One process's share of every step. Every rank has to call every method."""

    def __init__(
        self,
        settings: FinetuneSection,
        engine: Engine,
        ema: Ema | None,
        maker: BatchMaker,
        training: TrainingData,
        ledger: Ledger,
        warn: Callable[[str], None],
    ) -> None:
        self.settings, self.engine, self.ema, self.maker = settings, engine, ema, maker
        self.training, self.ledger = training, ledger
        self.ranks: Ranks = engine.ranks
        self.guard = Guard(
            ledger.folder / "not-finite.jsonl", self.ranks, settings.max_skipped, warn
        )
        self.share = share_of(
            range(settings.batch), self.ranks.rank, self.ranks.world, settings.micro_batch
        )
        self.num_updates = 0

    def take(
        self, step: int, feed: Feed, request: StopRequest
    ) -> tuple[dict[str, Any], str | None]:
        """Train on one global batch; returns what is logged, and why to stop, if anybody asked."""
        started, settings = time.monotonic(), self.settings
        watch.at(step + 1, "reading data")
        read = self.read(step, feed)
        sums = self.gradients(step, read.samples, read.num_good, request)
        watch.at(step + 1, "updating the weights")
        skipped = self.engine.num_skipped
        # Without a sample there is no gradient, and what came before must not move the weights.
        rate = self.learning_rate(step) if read.num_good else 0.0
        clip = settings.clip
        norm = self.engine.update(
            self.rates(rate), clip.norm if clip and step >= clip.from_step else 0.0
        )
        applied = self.engine.num_skipped == skipped
        numbers = on_host(sums)
        told = figures(numbers, read.num_good)
        if self.guard.passes(step, told["loss"], norm, applied, keys_of(read.samples)):
            self.num_updates += 1
            self.average()
        logged = {
            **told,
            "grad_norm": norm,
            "skipped_updates": step + 1 - self.num_updates,
            "lr": rate,
            "epoch": self.training.epoch(step, read.samples),
            "samples": (step + 1) * settings.batch,
            "bad_samples": self.ledger.num_bad,
            "seconds": round(time.monotonic() - started, 4),
            "seconds_waiting_for_data": round(read.seconds, 4),
        }
        asked = sum(numbers[ASKING]) > 0
        return logged, (request.reason or "another rank") if asked else None

    def read(self, step: int, feed: Feed) -> Read:
        """Wait for the samples, and agree with the other ranks on what there is."""
        started = time.monotonic()
        samples, failure = StepSamples(0), None
        try:
            samples = feed.step(step)
        except UserError as error:  # of this rank; the others have to hear of it
            failure = error
        waited = time.monotonic() - started
        num_good = sum(sample is not None for micro in samples.micro_batches for sample in micro)
        num_bad = sum(fault.count for fault in samples.faults)
        counts = torch.tensor(
            [num_good, num_bad, failure is not None],
            dtype=torch.float64,
            device=self.maker.device,
        )
        num_good, num_bad, num_failed = (int(n) for n in dist.summed(counts).tolist())
        if num_failed:
            dist.share_error(self.ranks, failure)
        self.ledger.note(samples.faults, num_good, num_bad)
        return Read(samples, num_good, waited)

    def gradients(
        self, step: int, read: StepSamples, num_good: int, request: StopRequest
    ) -> dict[str, Tensor]:
        """Forward and backward of every micro-batch; the sums, over all ranks, of what is logged.

        Nothing here waits for the device.
        """
        settings, patch = self.settings, self.maker.geometry.pixel_patch
        # DeepSpeed averages over micro-batches and ranks; the loss is a mean over good samples.
        scale = len(self.share) * self.ranks.world / max(num_good, 1)
        sums: dict[str, Tensor] = {}
        for number, (positions, samples) in enumerate(
            zip(self.share, read.micro_batches, strict=True)
        ):
            slots = [step * settings.batch + position for position in positions]
            first = next((sample.key for sample in samples if sample is not None), "no sample")
            watch.at(step + 1, "computing gradients", f"from {first} on")
            height, width = read.sizes[number]
            grid = (height // patch, width // patch)
            batch = self.maker.make(samples, Place(settings.seed, read.epoch, slots), grid)
            batch.measures = self.measures(step, num_good)
            torch.manual_seed(derive(settings.seed, "dropout", step, number, self.ranks.rank))
            add(sums, self.engine.forward_backward(batch, scale))
            if number < len(self.share) - 1:
                self.engine.micro_step_done()
        # As late as the ranks can agree on it: steps are long, and who asks does not wait for long.
        asking = request.reason is not None
        sums[ASKING] = torch.full((1,), float(asking), device=self.maker.device)
        return over_ranks(sums)

    def measures(self, step: int, num_good: int) -> bool:
        """Whether the gradient's variance is measured in this step."""
        every = self.settings.variance_every
        return every > 0 and (step + 1) % every == 0 and num_good > 1

    def learning_rate(self, step: int) -> float:
        use = self.settings.schedule
        return self.settings.optimizer.lr * learning_rate_factor(
            step,
            self.settings.steps,
            kind=use.kind,
            warmup=use.warmup,
            decay_from=use.decay_from,
            floor=use.floor,
        )

    def rates(self, rate: float) -> dict[str, float]:
        """The learning rate of every role."""
        scales = self.settings.optimizer.lr_scale
        roles = set(self.engine.trainable.roles.values())
        return {role: rate * scales.get(role, 1.0) for role in roles}

    def average(self) -> None:
        use = self.settings.ema
        if self.ema is None or use is None:
            return
        since = self.num_updates - use.from_step
        self.ema.update(
            karras_decay(since, use.gamma)
            if use.kind == "karras"
            else (use.decay if since > 0 else 0.0)
        )


def keys_of(read: StepSamples) -> list[str]:
    return [s.key for micro in read.micro_batches for s in micro if s is not None]
