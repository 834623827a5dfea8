"""finetune: lifted model + data -> checkpoints, previews and metrics.

The run is assembled here and led from step to step; finetune_step.py takes one. State is what a
checkpoint holds.
"""

import math
import time
from collections.abc import Iterator
from contextlib import ExitStack, closing, contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from asymlift.artifacts.checkpoint import Checkpoint, step_folder
from asymlift.artifacts.files import plural
from asymlift.artifacts.lifted_folder import read_lifted
from asymlift.artifacts.manifest import digest_json
from asymlift.data.feed import Feed
from asymlift.errors import StoppedEarly, UserError
from asymlift.families import family_of_lifted
from asymlift.model.compiling import explaining_compiler
from asymlift.model.ema import Ema
from asymlift.recipe import Recipe
from asymlift.runtime import dist, watch
from asymlift.runtime.dist import Ranks
from asymlift.runtime.engine import Engine, EngineSettings
from asymlift.runtime.log import (
    Ticker,
    keep_line,
    kept_warnings,
    progress,
    say,
    warn,
)
from asymlift.runtime.metrics import read_metrics
from asymlift.runtime.optimizers import OptimizerSettings
from asymlift.runtime.shared_folder import check_shared
from asymlift.runtime.signals import StopRequest, stop_requests
from asymlift.runtime.tables import show_table
from asymlift.runtime.watchdog import MARGIN, watched
from asymlift.stages.finetune.data import (
    Encoders,
    may_keep_sizes,
    open_training_data,
    sizes_of_lifted,
)
from asymlift.stages.finetune.journal import METRICS, Journal
from asymlift.stages.finetune.ledger import Ledger, by_reason, read_skipped
from asymlift.stages.finetune.memory import explaining_memory, resident
from asymlift.stages.finetune.model import adapters_of, build_step
from asymlift.stages.finetune.preview import Previews, is_missing
from asymlift.stages.finetune.rehearsal import Rehearsal
from asymlift.stages.finetune.resume import (
    Change,
    check_changes,
    find_checkpoint,
    recipe_facts,
    restored_rows,
)
from asymlift.stages.finetune.start import Start, accumulation_for, check_packages, locked
from asymlift.stages.finetune.state import TrainingState
from asymlift.stages.finetune.step import Trainer
from asymlift.stages.finetune.validation import Validation, is_unmeasured
from asymlift.stages.locate import check_lifted, checkpoints_path, lifted_path, named_family
from asymlift.stages.provenance import (
    add_to_start,
    library_versions,
    record_recipe,
    record_start,
)


@dataclass(frozen=True)
class FinetuneReport:
    """What a run did."""

    folder: Path
    step: int
    resumed_from: int
    checkpoint: Path
    seconds: float
    num_trained: int  # parameters
    last: dict[str, Any]  # the last line of metrics.jsonl; empty if nothing was left to do
    bad_samples: dict[str, int]  # reason -> samples that could not be trained on


def finetune(
    recipe: Recipe, ranks: Ranks, start: Start | None = None, *, zero3: dict[str, int] | None = None
) -> FinetuneReport:
    """Train to the recipe's last step, from the newest checkpoint that is whole."""
    start = start or Start()
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
        dist.first_does(ranks, lambda: check_packages(settings))
        dist.first_does(ranks, lambda: record_start(recipe, "finetune"))
        found = find_checkpoint(checkpoints_path(recipe), start.resume, ranks)
        if found is not None and is_finished(recipe, found, ranks):
            return dist.first_does(ranks, lambda: nothing_left(recipe, found))
        with explaining_memory(recipe, ranks, dict):
            run = Run(recipe, ranks, device, accumulation, zero3 or {})
        with explaining_memory(recipe, ranks, run.resident), explaining_compiler():
            return run.to_the_end(found, start, request)


def is_finished(recipe: Recipe, found: Checkpoint, ranks: Ranks) -> bool:
    """Whether all steps are taken, and the last one is measured and shown."""
    return found.step >= recipe.finetune.steps and not dist.first_does(
        ranks, lambda: is_unmeasured(recipe, found.step) or is_missing(recipe, found.step)
    )


def nothing_left(recipe: Recipe, found: Checkpoint) -> FinetuneReport:
    """The report of a run that had taken all its steps before."""
    folder = recipe.run_folder
    if found.step > recipe.finetune.steps:
        warn(f"finetune.steps is {recipe.finetune.steps}, and {found.step} are taken already")
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
        self.family = family_of_lifted(self.lifted.family, named_family(recipe))
        check_lifted(self.lifted, self.family, recipe.model.base)
        dist.first_does(ranks, self.check_sizes)

        watch.at(None, "opening the data")
        self.training = open_training_data(recipe, self.lifted, self.family, ranks)
        self.ledger = Ledger(self.folder, ranks, recipe.data.max_bad_fraction)
        self.training.enter_faults(self.ledger)
        watch.at(None, "encoding prompts")
        encoders = Encoders(self.lifted, self.family, recipe, ranks, device, self.training)
        self.maker = encoders.batch_maker(self.settings)
        self.previews = Previews.begin(recipe, self.lifted, self.family, ranks, device, encoders)
        self.validation = Validation.begin(
            recipe, self.lifted, self.family, ranks, self.training, encoders
        )
        encoders.let_go()

        watch.at(None, "loading the model")
        self.step_module, self.trainable = dist.all_do(
            ranks,
            lambda: build_step(self.settings, self.lifted, self.family, self.precision, device),
        )
        watch.at(None, "starting the engine")
        self.engine = Engine(self.step_module, self.trainable, self.engine_settings(zero3), ranks)
        average = self.settings.ema
        self.ema = Ema.of(self.trainable.parameters, ranks, average.shard) if average else None
        self.log = self.folder / "logs" / f"rank-{ranks.rank}.log"
        self.warn = kept_warnings(self.log)
        self.state = TrainingState(
            checkpoints_path(recipe),
            self.engine,
            self.ema,
            self.settings.checkpoint,
            self.log,
        )
        self.trainer = Trainer(
            self.settings, self.engine, self.ema, self.maker, self.training, self.ledger, self.warn
        )

    def check_sizes(self) -> None:
        """Refuse sizes that the model cannot draw, before anything is encoded."""
        stored = may_keep_sizes(self.recipe.data)
        sizes_of_lifted(self.lifted, self.family).check_recipe(self.recipe, stored=stored)

    def engine_settings(self, zero3: dict[str, int]) -> EngineSettings:
        use = self.settings
        return EngineSettings(
            zero_stage=use.zero.stage,
            offload=use.zero.offload,
            micro_batch=use.micro_batch,
            accumulation=self.accumulation,
            optimizer=OptimizerSettings(
                kind=use.optimizer.kind,
                betas=use.optimizer.betas,
                eps=use.optimizer.eps,
                weight_decay=use.optimizer.weight_decay,
                momentum=use.optimizer.momentum,
            ),
            autocast=self.precision if use.train == "full" else None,
            zero3=zero3 if use.zero.stage == 3 else {},
        )

    def resident(self) -> dict[str, int]:
        return resident(self.engine, self.ema, self.step_module)

    # --- the loop -----------------------------------------------------------------------------

    def to_the_end(
        self, found: Checkpoint | None, start: Start, request: StopRequest
    ) -> FinetuneReport:
        started = time.monotonic()
        steps, begin = self.settings.steps, found.step if found else 0
        last: dict[str, Any] = {}
        if found is not None:  # before anything takes time
            changes = check_changes(found, self.facts(), allowed=start.allow_changes)
        if start.rehearse or (start.rehearse is None and self.device.type == "cuda"):
            self.rehearse(begin)
        if found is not None:
            if self.previews is not None:  # as long as the weights are those of the lifted model
                self.previews.keep_lifted(self.step_module.student)
            self.resume(found, changes)
        if self.ranks.first:
            self.announce(begin)
        dist.first_does(self.ranks, lambda: self.note_start(begin))
        with self.journal(begin) as journal, self.ticker(begin) as ticker:
            if begin == 0:
                self.begin_curves(journal)
            else:
                self.catch_up(begin, journal)
            with self.feed(begin) as feed:
                for step in range(begin, steps):
                    if self.ranks.first:
                        request.look_for_file(self.folder)
                    last, stop = self.trainer.take(step, feed, request)
                    done, ends = step + 1, step + 1 == steps
                    if ends or not stop:
                        last |= self.validate(done)
                    last |= self.state.told()
                    if journal is not None:
                        last = journal.step(done, last)
                    if ticker is not None:
                        ticker.tick(note=f"loss {last['loss']:.4f}")
                    if done % self.settings.checkpoint.every == 0 or ends or stop:
                        self.save(done, must=ends or stop is not None)
                    if stop and self.ranks.first:
                        request.obeyed(self.folder)
                    if stop and not ends:
                        raise StoppedEarly(
                            f"stopped by {stop} after step {done} of {steps}, and saved; "
                            "run the same command again to go on",
                            request.exit,
                        )
                    self.show_what_is_due(done, journal)
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
        check = self.training.check(self.family, self.lifted.geometry, self.maker.null_text)
        return self.training.feed(self.ranks, begin, check, self.warn)

    @contextmanager
    def journal(self, begin: int) -> Iterator[Journal | None]:
        """Rank 0's account of the run."""
        with ExitStack() as opened:

            def start() -> None:
                journal = Journal(self.recipe, begin, self.device, lambda: self.ledger.reasons)
                opened.enter_context(closing(journal))
                box.append(journal)

            box: list[Journal] = []
            dist.first_does(self.ranks, start)
            try:
                yield box[0] if box else None
            except UserError as ending:
                watch.ends()
                keep_line(self.log, str(ending))
                for journal in box:
                    journal.write_page(str(ending).splitlines()[0])
                raise

    @contextmanager
    def ticker(self, begin: int) -> Iterator[Ticker | None]:
        """Progress on rank 0's screen."""
        with (
            progress("finetune", self.settings.steps, begin)
            if self.ranks.first
            else nullcontext(None) as ticker
        ):
            yield ticker

    def begin_curves(self, journal: Journal | None) -> None:
        """What the model does as converted: the first point of every curve."""
        values = self.validate(0)
        if journal is not None:
            journal.start(values)
        self.show_what_is_due(0, journal)

    def catch_up(self, step: int, journal: Journal | None) -> None:
        """Measure and show what is due at the step that was saved last.

        A stop waits for neither, and a kill may have come between.
        """
        unmeasured = dist.first_does(self.ranks, lambda: is_unmeasured(self.recipe, step))
        if unmeasured:
            values = self.validate(step)
            if journal is not None:
                journal.measured(step, values)
        if unmeasured or dist.first_does(self.ranks, lambda: is_missing(self.recipe, step)):
            self.show_what_is_due(step, journal)

    def validate(self, step: int) -> dict[str, Any]:
        """The numbers of the averaged weights on held-out samples, if it is time for them."""
        if self.validation is None or not self.validation.is_due(step, self.settings.steps):
            return {}
        watch.at(step, "validating")
        with self.state.showing_average():
            return self.validation.measure(self.step_module, self.maker)

    def show_what_is_due(self, step: int, journal: Journal | None) -> None:
        """Previews, and the page whenever there is something new to be seen on it."""
        ends, every = step == self.settings.steps, self.settings.checkpoint.every
        drawn = self.previews is not None and (step % self.previews.every == 0 or ends)
        if drawn:
            self.show(step)
        if journal is None:
            return
        if self.previews is not None and drawn and (grid := self.previews.grid(step)).exists():
            journal.preview(step, grid)
        validated = self.validation is not None and self.validation.is_due(step, step + 1)
        if drawn or validated or ends or step % every == 0:
            watch.at(step, "writing the report")
            journal.write_page("finished" if ends else "running")

    def show(self, step: int) -> None:
        """Pictures of the averaged weights, which sit in the model only while they are made."""
        assert self.previews is not None
        watch.at(step, "drawing previews")
        with self.state.showing_average():
            self.previews.show(step, self.step_module.student)

    # --- state --------------------------------------------------------------------------------

    def note_start(self, begin: int) -> None:
        """What run.json and config.yaml say of this start, now that it is a run."""
        record_recipe(self.recipe)
        fingerprints = {**self.lifted.fingerprints, **self.facts()["fingerprints"]}
        add_to_start(
            self.recipe, fingerprints=fingerprints, ranks=self.ranks.world, after_step=begin
        )

    def facts(self) -> dict[str, Any]:
        """What a checkpoint says of its run, beside the tensors."""
        adapters = adapters_of(self.settings, self.family)
        return {
            "lora": {"rank": adapters.rank, "alpha": adapters.alpha} if adapters else None,
            "fingerprints": {
                "lifted": digest_json(self.lifted.facts),
                "data": self.training.digest,
            },
            **recipe_facts(self.recipe),
            "parameters": self.state.parameters,
            "ranks": self.ranks.world,
            "versions": library_versions(),
        }

    def save(self, step: int, *, must: bool) -> None:
        watch.at(step, "saving")
        counts = {
            "samples": step * self.settings.batch,
            "seen": self.ledger.num_seen,
            "bad": self.ledger.num_bad,
            "not_finite": self.trainer.guard.in_a_row,
        }
        self.state.save(step, {**self.facts(), **counts}, must=must)

    def resume(self, found: Checkpoint, changes: list[Change]) -> None:
        """Go on from a checkpoint, and say what it brought."""
        watch.at(found.step, "resuming")
        self.state.restore(found)
        self.trainer.num_updates = found.state["updates"]
        self.trainer.guard.in_a_row = found.state["not_finite"]
        self.ledger.num_seen, self.ledger.num_bad = found.state["seen"], found.state["bad"]
        if self.ranks.first:
            rows = restored_rows(found, self.facts(), changes)
            keep_line(self.log, "\n".join(show_table(f"resumed from {found.folder}", rows)))

    def rehearse(self, begin: int) -> None:
        """Everything once that needs memory or disk; afterwards all is as it was."""
        rehearsal = Rehearsal(
            self.trainer,
            self.state,
            self.step_module,
            self.previews,
            self.validation,
            self.facts(),
        )
        if lines := rehearsal.run(self.settings.steps - begin):
            keep_line(self.log, "\n".join(lines))

    def announce(self, begin: int) -> None:
        settings = self.settings
        said = (
            f"finetune {self.recipe.name}: {self.trainable.num_parameters:,} parameters train, "
            f"{settings.steps} steps of {settings.batch} ({self.training.about()}), "
            f"{self.ranks.world} rank(s) x {settings.micro_batch} x {self.accumulation}, "
            f"{self.engine.about}, {settings.precision}"
        )
        say(said)
        keep_line(self.log, said)
        metrics = self.folder / METRICS
        taken = [line["step"] for line in read_metrics(metrics)] if metrics.is_file() else []
        if taken and taken[-1] > begin:
            lost = taken[-1] - begin
            say(f"{plural(lost, 'step')} of an earlier start, not saved, will be taken again")
