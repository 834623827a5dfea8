"""Rehearsal: everything that needs memory or disk, once, before the first step.

What would fail after an hour (the largest pictures, a preview, a full disk) fails in the first
minute, by name. Nothing of it stays: the learning rate is 0, so weights do not move, what the
optimizer remembers is emptied, the average is not updated, and what is written is removed.
"""

import shutil
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from asymlift.artifacts.checkpoint import REHEARSING
from asymlift.artifacts.files import human_bytes
from asymlift.data.records import Sample
from asymlift.errors import CannotWrite
from asymlift.model.batch import Place
from asymlift.model.evaluating import evaluating
from asymlift.model.training_step import TrainingStep
from asymlift.runtime import dist, watch
from asymlift.runtime.dist import Ranks
from asymlift.runtime.engine import Engine
from asymlift.runtime.failures import is_out_of_memory
from asymlift.runtime.log import say
from asymlift.runtime.memory import peak_of_process
from asymlift.runtime.tables import show_table
from asymlift.stages.finetune.preview import Previews
from asymlift.stages.finetune.state import TrainingState
from asymlift.stages.finetune.step import Trainer
from asymlift.stages.finetune.validation import Validation
from asymlift.words import human_seconds

LOW_NOISE = 0.05  # every term of the loss counts there, so none is left out
LONG = "word " * 1000  # a caption that fills whatever length the encoder takes

STEP = "a training step"


@dataclass(frozen=True)
class Phase:
    """Something to do, and what to call it."""

    name: str
    act: Callable[[], None]


@dataclass(frozen=True)
class Took:
    """What a phase needed, on the rank that needed most."""

    name: str
    seconds: float
    before: int  # bytes that were held
    peak: int


@dataclass(frozen=True)
class Rehearsal:
    """What a run is made of. Every rank has to call every method."""

    trainer: Trainer
    state: TrainingState
    step: TrainingStep
    previews: Previews | None
    validation: Validation | None
    facts: dict[str, Any]  # of a checkpoint

    def run(self, steps: int) -> list[str]:
        """Do and undo it; says what was needed, and returns the lines."""
        ranks, device = self.trainer.ranks, self.trainer.maker.device
        took = [rehearsed(phase, ranks, device) for phase in self.phases()]
        forget(self.state.engine)
        return show_rehearsal(took, steps) if ranks.first else []

    def phases(self) -> list[Phase]:
        """In the order of a run. The first step is slower than the others, so there are two."""
        step = partial(training_step, self.trainer)
        phases = [Phase("the first training step", step), Phase(STEP, step)]
        if self.previews is not None:
            phases.append(Phase("a batch of previews", partial(self.preview, self.previews)))
        if self.validation is not None:
            phases.append(Phase("a validation batch", partial(self.validate, self.validation)))
        return [*phases, Phase("a checkpoint", self.checkpoint)]

    def preview(self, previews: Previews) -> None:
        with self.state.showing_average():
            previews.rehearse(self.step.student)

    def validate(self, validation: Validation) -> None:
        largest = max(validation.mine, key=lambda sample: sample.image.numel())
        with self.state.showing_average(), torch.no_grad(), evaluating(self.step):
            validation.losses(self.step, self.trainer.maker, largest)

    def checkpoint(self) -> None:
        """A whole one, beside the others."""
        folder = self.state.checkpoints / f"{REHEARSING}save"
        counts = {"samples": 0, "seen": 0, "bad": 0}
        try:
            said = self.state.attempt(folder, 0, {**self.facts, **counts})
        finally:
            if self.trainer.ranks.first:
                shutil.rmtree(folder, ignore_errors=True)
        if said is not None:
            raise CannotWrite(f"{said};\nfree some space, or choose another `runs` folder")


def rehearsed(phase: Phase, ranks: Ranks, device: torch.device) -> Took:
    watch.at(None, f"rehearsing {phase.name}")
    before, started = held(device), time.monotonic()
    try:
        phase.act()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
    except Exception as error:
        if is_out_of_memory(error):
            held_before = f"before which {human_bytes(before)} were held"
            watch.at(None, f"rehearsing {phase.name}, {held_before}")
        raise
    mine = (time.monotonic() - started, before, peak(device))
    every = dist.gathered(ranks, mine)
    return Took(phase.name, *map(max, zip(*every, strict=True)))


def held(device: torch.device) -> int:
    """Bytes now; begins a new peak."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        return torch.cuda.memory_allocated(device)
    return peak(device)


def peak(device: torch.device) -> int:
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return peak_of_process()


def show_rehearsal(took: Sequence[Took], steps: int) -> list[str]:
    """Print what was needed, and how long the run will be; returns the lines."""
    rows = [(one.name, f"peak {human_bytes(one.peak)}", f"{one.seconds:.1f} s") for one in took]
    lines = show_table("rehearsed, and thrown away", rows)
    per_step = next(one.seconds for one in took if one.name == STEP)
    about = (
        f"{per_step:.1f} s per step of the largest pictures: at most about "
        f"{human_seconds(per_step * steps)} for {steps} steps, beside previews and saves"
    )
    say(about)
    return [*lines, about]


# ---- the phases ----------------------------------------------------------------------------------


def training_step(trainer: Trainer) -> None:
    """The largest pictures, all slots filled, forward and backward, and an update by nothing."""
    maker, settings, size = trainer.maker, trainer.settings, trainer.training.largest()
    patch = maker.geometry.pixel_patch
    grid = (size[0] // patch, size[1] // patch)
    for number, positions in enumerate(trainer.share):
        samples = [blank(trainer, size) for _ in positions]
        batch = maker.make(samples, Place(settings.seed, 0, list(positions)), grid)
        batch.sigma = torch.full_like(batch.sigma, LOW_NOISE)
        batch.measures = settings.variance_every > 0
        trainer.engine.forward_backward(batch, 1 / settings.batch)
        if number < len(trainer.share) - 1:
            trainer.engine.micro_step_done()
    trainer.engine.update(trainer.rates(0.0), settings.clip.norm if settings.clip else 0.0)


def blank(trainer: Trainer, size: tuple[int, int]) -> Sample:
    """A grey picture; what is not cached has to be encoded."""
    maker, training, (height, width) = trainer.maker, trainer.training, size
    geometry = maker.geometry
    sides = (height // geometry.vae_factor, width // geometry.vae_factor)
    return Sample(
        key="rehearsal",
        image=torch.full((3, height, width), 128, dtype=torch.uint8),
        caption=LONG,
        latent=None if training.latents_online else torch.zeros(geometry.channels, *sides),
        text=None if training.text_online else maker.null_text,
    )


def forget(engine: Engine) -> None:
    """Empty what the optimizer remembers: no update was made."""

    def zeros(moment: str, stretch: slice) -> Tensor:
        return torch.zeros(stretch.stop - stretch.start)

    engine.set_moments(zeros, 0)
