"""What rank 0 tells of a run: a line per step, trackers, the page. Nothing of it ends the run."""

import time
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch

from asymlift.artifacts.files import write_bytes_atomically
from asymlift.recipe import Recipe
from asymlift.report.training_report import TrainingRun, training_page
from asymlift.runtime.log import warn
from asymlift.runtime.memory import peak_of_process
from asymlift.runtime.metrics import Metrics, read_metrics
from asymlift.runtime.trackers import Trackers, open_tracker
from asymlift.stages.provenance import commands_in, resolved

METRICS, PAGE = "metrics.jsonl", "report.html"
GIB = 1 << 30


class Journal:
    """Open from the first step to the last."""

    def __init__(
        self,
        recipe: Recipe,
        begin: int,
        device: torch.device,
        reasons: Callable[[], Mapping[str, int]],
    ) -> None:
        self.recipe, self.folder, self.device = recipe, recipe.run_folder, device
        self.begin, self.steps, self.reasons = begin, recipe.finetune.steps, reasons
        self.trackers = Trackers([Metrics(self.folder / METRICS, begin)])
        for name in recipe.finetune.trackers:
            begun = partial(open_tracker, name, self.folder, begin)
            self.trackers.add(name, partial(begun, run=recipe.name, config=resolved(recipe)))
        self.page_failed = False
        self.started = time.monotonic()

    def start(self, values: Mapping[str, Any]) -> None:
        """What is known before the first step."""
        if values:
            self.trackers.numbers(0, values)
        self.started = time.monotonic()

    def measured(self, step: int, values: Mapping[str, Any]) -> None:
        """What the step that a run goes on from was left without."""
        self.trackers.numbers(step, values)
        self.started = time.monotonic()

    def step(self, done: int, values: Mapping[str, Any]) -> dict[str, Any]:
        """Write the line of a step; returns all that is in it."""
        line = {**values, **self.derived(done, values)}
        self.trackers.numbers(done, line)
        return line

    def derived(self, done: int, values: Mapping[str, Any]) -> dict[str, float]:
        seconds, waiting = values["seconds"], values["seconds_waiting_for_data"]
        # Previews, validations and saves count: what is left has them too.
        pace = (time.monotonic() - self.started) / (done - self.begin)
        return {
            "seconds_computing": round(seconds - waiting, 4),
            "images_per_second": round(self.recipe.finetune.batch / max(seconds, 1e-9), 3),
            "seconds_to_go": round(pace * (self.steps - done), 1),
            "peak_gib": round(self.peak() / GIB, 3),
        }

    def peak(self) -> int:
        """Bytes: of the GPU where there is one."""
        if self.device.type == "cuda":
            return torch.cuda.max_memory_allocated(self.device)
        return peak_of_process()

    def preview(self, step: int, grid: Path) -> None:
        self.trackers.picture(step, "preview", grid)

    def write_page(self, state: str) -> None:
        """The whole page anew: it may be looked at while the run goes on."""
        try:
            starts = commands_in(self.folder)
            run = TrainingRun(
                name=self.recipe.name,
                steps=self.steps,
                state=state,
                metrics=read_metrics(self.folder / METRICS),
                samples=self.folder / "samples",
                left_out=self.reasons(),
                about=starts[-1] if starts else {},
            )
            write_bytes_atomically(self.folder / PAGE, training_page(run).encode())
        except Exception as error:  # a full disk, a picture that somebody is replacing
            if not self.page_failed:
                warn(f"{self.folder / PAGE}: {error}; training goes on")
            self.page_failed = True

    def close(self) -> None:
        self.trackers.close()
