"""finetune: lifted model + data -> checkpoints, previews and metrics.

The run is assembled here and led from step to step; finetune_step.py takes one. State is what a
checkpoint holds.
"""

import json
import math
import time
from collections.abc import Iterator
from contextlib import ExitStack, closing, contextmanager, nullcontext
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch

from asymlift.artifacts.checkpoint import Checkpoint, step_folder
from asymlift.artifacts.files import exclusive_lock, write_bytes_atomically, writing
from asymlift.artifacts.lifted_folder import read_lifted
from asymlift.artifacts.manifest import digest_json
from asymlift.data.feed import Feed
from asymlift.errors import BadRecipe, StoppedEarly
from asymlift.families import find_family
from asymlift.model.ema import Ema
from asymlift.recipe import FinetuneSection, Recipe
from asymlift.report.training_report import training_page
from asymlift.runtime import dist, watch
from asymlift.runtime.dist import Ranks
from asymlift.runtime.engine import Engine, EngineSettings
from asymlift.runtime.log import (
    Metrics,
    Ticker,
    detail,
    kept_warnings,
    progress,
    read_metrics,
    say,
)
from asymlift.runtime.shared_folder import check_shared
from asymlift.runtime.signals import StopRequest, stop_requests
from asymlift.runtime.watchdog import MARGIN, watched
from asymlift.stages.finetune_data import Encoders, check_sample, open_training_data
from asymlift.stages.finetune_ledger import Ledger, by_reason, read_skipped
from asymlift.stages.finetune_model import adapters_of, build_step
from asymlift.stages.finetune_state import TrainingState, find_checkpoint
from asymlift.stages.finetune_step import Trainer
from asymlift.stages.locate import checkpoints_path, lifted_path
from asymlift.stages.preview import Previews
from asymlift.stages.provenance import library_versions


@dataclass(frozen=True)
class FinetuneReport:
    """What a run did."""

    folder: Path
    step: int
    resumed_from: int
    checkpoint: Path
    seconds: float
    num_trained: int  # parameters
    last: dict[str, float]  # the last line of metrics.jsonl; empty if nothing was left to do
    bad_samples: dict[str, int]  # reason -> samples that could not be trained on


def finetune(
    recipe: Recipe, ranks: Ranks, *, zero3: dict[str, int] | None = None
) -> FinetuneReport:
    """Train to the recipe's last step, from the newest checkpoint that is whole."""
    settings = recipe.finetune
    accumulation = accumulation_for(settings, ranks)
    device = dist.device_for(ranks)
    dist.join(ranks, device, settings.timeout + MARGIN)
    with (
        stop_requests() as request,
        watched(ranks, settings.timeout),
        locked(recipe.run_folder, ranks),
    ):
        check_shared(recipe.run_folder, ranks)
        found = find_checkpoint(checkpoints_path(recipe), ranks)
        if found is not None and found.step >= settings.steps:
            return dist.first_does(ranks, lambda: nothing_left(recipe.run_folder, found))
        return Run(recipe, ranks, device, accumulation, zero3 or {}).to_the_end(found, request)


def nothing_left(folder: Path, found: Checkpoint) -> FinetuneReport:
    """The report of a run that had taken all its steps before."""
    return FinetuneReport(
        folder=folder,
        step=found.step,
        resumed_from=found.step,
        checkpoint=found.folder,
        seconds=0.0,
        num_trained=sum(math.prod(shape) for _, shape, _ in found.state["parameters"]),
        last={},
        bad_samples=by_reason(read_skipped(folder)),
    )


def accumulation_for(settings: FinetuneSection, ranks: Ranks) -> int:
    at_once = settings.micro_batch * ranks.world
    if settings.batch % at_once:
        raise BadRecipe(
            f"finetune.batch {settings.batch} is not a multiple of micro_batch "
            f"{settings.micro_batch} x {ranks.world} ranks; change one of the three"
        )
    return settings.batch // at_once


@contextmanager
def locked(folder: Path, ranks: Ranks) -> Iterator[None]:
    """One finetune per run folder."""
    with ExitStack() as held:

        def lock() -> None:
            with writing(folder):
                folder.mkdir(parents=True, exist_ok=True)
            held.enter_context(exclusive_lock(folder / ".finetune.lock", "this run"))

        dist.first_does(ranks, lock)
        yield


class Run:
    """One process's share of a run: what it holds, and what it does with every step."""

    def __init__(
        self,
        recipe: Recipe,
        ranks: Ranks,
        device: torch.device,
        accumulation: int,
        zero3: dict[str, int],
    ) -> None:
        self.recipe, self.settings, self.ranks, self.device = recipe, recipe.finetune, ranks, device
        self.folder, self.accumulation = recipe.run_folder, accumulation
        self.precision = torch.bfloat16 if self.settings.precision == "bfloat16" else None
        self.lifted = dist.all_do(ranks, lambda: read_lifted(lifted_path(recipe)))
        own = ":" in recipe.model.family
        self.family = find_family(recipe.model.family if own else self.lifted.family, {}, {})

        watch.at(None, "opening the data")
        self.training = open_training_data(recipe, self.lifted, self.family, ranks)
        self.ledger = Ledger(self.folder, ranks, recipe.data.max_bad_fraction)
        self.training.enter_faults(self.ledger)
        watch.at(None, "encoding prompts")
        encoders = Encoders(self.lifted, self.family, recipe, ranks, device, self.training)
        self.maker = encoders.batch_maker(self.settings)
        self.previews = Previews.begin(recipe, self.lifted, self.family, ranks, device, encoders)
        encoders.let_go()

        watch.at(None, "loading the model")
        self.step_module, self.trainable = dist.all_do(
            ranks,
            lambda: build_step(self.settings, self.lifted, self.family, self.precision, device),
        )
        watch.at(None, "starting the engine")
        self.engine = Engine(self.step_module, self.trainable, self.engine_settings(zero3), ranks)
        self.ema = Ema(self.trainable.parameters) if self.settings.ema else None
        self.state = TrainingState(
            checkpoints_path(recipe), self.engine, self.ema, self.settings.checkpoint
        )
        self.warn = kept_warnings(self.folder / "logs" / f"rank-{ranks.rank}.log")
        self.trainer = Trainer(
            self.settings, self.engine, self.ema, self.maker, self.training, self.ledger, self.warn
        )

    def engine_settings(self, zero3: dict[str, int]) -> EngineSettings:
        use = self.settings
        return EngineSettings(
            zero_stage=use.zero.stage,
            micro_batch=use.micro_batch,
            accumulation=self.accumulation,
            betas=use.optimizer.betas,
            eps=use.optimizer.eps,
            weight_decay=use.optimizer.weight_decay,
            autocast=self.precision if use.train == "full" else None,
            zero3=zero3 if use.zero.stage == 3 else {},
        )

    # --- the loop -----------------------------------------------------------------------------

    def to_the_end(self, found: Checkpoint | None, request: StopRequest) -> FinetuneReport:
        started = time.monotonic()
        steps, begin = self.settings.steps, self.resume(found) if found else 0
        last: dict[str, float] = {}
        if self.ranks.first:
            self.announce(begin)
        if self.previews and begin == 0:
            self.show(0)
        with self.feed(begin) as feed, self.metrics(begin) as metrics, self.ticker(begin) as ticker:
            for step in range(begin, steps):
                if self.ranks.first:
                    request.look_for_file(self.folder)
                last, stop = self.trainer.take(step, feed, request)
                done = step + 1
                if metrics is not None:
                    metrics.write(done, **last)
                if ticker is not None:
                    ticker.tick(note=f"loss {last['loss']:.4f}")
                if done % self.settings.checkpoint.every == 0 or done == steps or stop:
                    self.save(done)
                if stop and done < steps:
                    if self.ranks.first:
                        request.obeyed(self.folder)
                    raise StoppedEarly(
                        f"stopped by {stop} after step {done} of {steps}, and saved; "
                        "run the same command again to go on",
                        request.exit,
                    )
                if self.previews and (done % self.previews.every == 0 or done == steps):
                    self.show(done)
        watch.at(steps, "writing the report")
        dist.first_does(self.ranks, self.write_page)
        return FinetuneReport(
            folder=self.folder,
            step=steps,
            resumed_from=begin,
            checkpoint=step_folder(self.state.checkpoints, steps),
            seconds=time.monotonic() - started,
            num_trained=self.trainable.num_parameters,
            last=last,
            bad_samples=self.ledger.reasons,
        )

    def feed(self, begin: int) -> Feed:
        check = partial(
            check_sample,
            family=self.family,
            geometry=self.lifted.geometry,
            null_text=self.maker.null_text,
            text_online=self.training.text_online,
        )
        return self.training.feed(self.ranks, begin, check, self.warn)

    @contextmanager
    def metrics(self, begin: int) -> Iterator[Metrics | None]:
        """metrics.jsonl of rank 0."""
        with ExitStack() as opened:

            def begin_file() -> None:
                metrics = Metrics(self.folder / "metrics.jsonl", begin)
                opened.enter_context(closing(metrics))
                box.append(metrics)

            box: list[Metrics] = []
            dist.first_does(self.ranks, begin_file)
            yield box[0] if box else None

    @contextmanager
    def ticker(self, begin: int) -> Iterator[Ticker | None]:
        """Progress on rank 0's screen."""
        with (
            progress("finetune", self.settings.steps, begin)
            if self.ranks.first
            else nullcontext(None) as ticker
        ):
            yield ticker

    def write_page(self) -> None:
        lines = read_metrics(self.folder / "metrics.jsonl")
        samples, reasons = self.folder / "samples", self.ledger.reasons
        text = training_page(f"finetune {self.recipe.name}", lines, samples, reasons)
        write_bytes_atomically(self.folder / "finetune-report.html", text.encode())

    def show(self, step: int) -> None:
        """Pictures of the averaged weights, which sit in the model only while they are made."""
        assert self.previews is not None
        watch.at(step, "drawing previews")
        shards = self.ema.shards if self.ema else {}
        with self.engine.showing(shards):
            self.previews.show(step, self.step_module.student)

    # --- state --------------------------------------------------------------------------------

    def facts(self) -> dict[str, Any]:
        """What a checkpoint says of its run, beside the tensors."""
        adapters = adapters_of(self.settings, self.family)
        return {
            "lora": {"rank": adapters.rank, "alpha": adapters.alpha} if adapters else None,
            "fingerprints": {
                "lifted": digest_json(self.lifted.facts),
                "data": self.training.digest,
            },
            "recipe": {
                **json.loads(self.settings.model_dump_json()),
                "data.text": self.recipe.data.text,
                "data.caption": self.recipe.data.caption.model_dump(),
                "data.caption_dropout": self.recipe.data.caption_dropout,
                "model.text_length": self.recipe.model.text_length,
            },
            "versions": library_versions(),
        }

    def save(self, step: int) -> None:
        watch.at(step, "saving")
        counts = {
            "samples": step * self.settings.batch,
            "seen": self.ledger.num_seen,
            "bad": self.ledger.num_bad,
        }
        self.state.save(step, {**self.facts(), **counts})
        detail(f"saved {step_folder(self.state.checkpoints, step)}")

    def resume(self, found: Checkpoint) -> int:
        """Go on from a checkpoint; returns its step."""
        watch.at(found.step, "resuming")
        self.state.check(found, self.facts())
        self.trainer.warm_up(found.step)
        self.state.restore(found)
        self.trainer.num_updates = found.state["updates"]
        self.ledger.num_seen, self.ledger.num_bad = found.state["seen"], found.state["bad"]
        return found.step

    def announce(self, begin: int) -> None:
        settings = self.settings
        say(
            f"finetune {self.recipe.name}: {self.trainable.num_parameters:,} parameters train, "
            f"{settings.steps} steps of {settings.batch} ({self.training.about()}), "
            f"{self.ranks.world} rank(s) x {settings.micro_batch} x {self.accumulation}, "
            f"ZeRO {settings.zero.stage}, {settings.precision}"
        )
        if begin:
            say(f"resumed after step {begin}")
