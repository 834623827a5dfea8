"""Run by test_step.py as one rank or two: a real Trainer over a tiny random model.

Prints one JSON document: what the steps told, at the ZeRO stages named on the command line.
"""

import json
import sys
from functools import partial
from pathlib import Path
from typing import Any

import torch

from asymlift.data.feed import StepSamples
from asymlift.data.order import derive
from asymlift.data.records import Sample
from asymlift.errors import BadData
from asymlift.families import FAMILIES
from asymlift.maths.color import ColorCode
from asymlift.model.batch import BatchMaker, Place
from asymlift.recipe import FinetuneSection
from asymlift.runtime import dist
from asymlift.runtime.dist import Ranks
from asymlift.runtime.engine import Engine, EngineSettings
from asymlift.runtime.optimizers import OptimizerSettings
from asymlift.runtime.signals import StopRequest
from asymlift.stages.finetune.ledger import Ledger
from asymlift.stages.finetune.model import assemble_step
from asymlift.stages.finetune.step import Trainer
from tests.families.case import case_of
from tests.tiny import lifted_pair

STRICT = {
    "stage3_param_persistence_threshold": 0,
    "stage3_max_live_parameters": 0,
    "stage3_max_reuse_distance": 0,
    "stage3_prefetch_bucket_size": 0,
}
BATCH, MICRO = 4, 2
COLOR = ColorCode("rgb", (0.5, 0.4, 0.6), 0.3)
ASKED_IN = 2  # step, counted from 0
LEVELS = (0.95, 0.7, 0.01, 0.02)  # of every step: the reference corrects none of the last two


class Data:
    """Samples by position, one of which may be broken in some steps; it is its own feed."""

    def __init__(self, share: list[range], broken: set[int], name: str = "flux2") -> None:
        self.share, self.broken, self.case = share, broken, case_of(name)

    @property
    def size(self) -> tuple[int, int]:
        return self.case.height, self.case.width

    def step(self, step: int) -> StepSamples:
        micro = [[self.sample(step, at) for at in positions] for positions in self.share]
        return StepSamples(0, list(micro), [self.size] * len(micro))

    def sample(self, step: int, position: int) -> Sample:
        g = torch.Generator().manual_seed(derive(step, position))
        sizes = self.case.sizes
        cells = (side // sizes.vae_factor for side in self.size)
        latent = torch.randn(sizes.channels, *cells, generator=g)
        if step in self.broken and position == 0:
            latent[0, 0, 0] = torch.nan
        return Sample(
            f"{step}-{position}",
            torch.randint(0, 256, (3, *self.size), generator=g, dtype=torch.uint8),
            "",
            latent=latent,
            text=self.case.sample(partial(torch.randn, generator=g), 0),
        )

    def epoch(self, step: int, read: StepSamples) -> float:
        return 0.0


def settings_for(stage: int, **changes: Any) -> FinetuneSection:
    return FinetuneSection.model_validate(
        {
            "batch": BATCH,
            "micro_batch": MICRO,
            "precision": "float32",
            "train": {"lora": {"rank": 2, "alpha": 2.0, "dropout": 0.0}},
            "loss": {"skip_below": 0.3, "perceptual": None},
            "optimizer": {"lr": 1e-3},
            "schedule": {"warmup": 0},
            "zero": {"stage": stage},
            "ema": None,
            "variance_every": 2,
            "max_skipped": 2,
            **changes,
        }
    )


def trainer_for(
    stage: int, ranks: Ranks, folder: Path, name: str = "flux2", **changes: Any
) -> Trainer:
    settings, family = settings_for(stage, **changes), FAMILIES[name]
    precision = torch.bfloat16 if settings.precision == "bfloat16" else None
    pair = lifted_pair(name, dtype=torch.float32, precision=precision)
    pair.pixel.net.requires_grad_(False)
    module, trainable = assemble_step(settings, family, lambda: pair.pixel, COLOR.decode, None)
    use = settings.optimizer
    optimizer = OptimizerSettings(use.kind, use.betas, use.eps, use.weight_decay, use.momentum)
    accumulation = BATCH // (MICRO * ranks.world)
    engine = Engine(
        module,
        trainable,
        EngineSettings(
            stage, "none", MICRO, accumulation, optimizer, None, STRICT if stage == 3 else {}
        ),
        ranks,
    )

    def levels(place: Place, size: tuple[int, int]) -> torch.Tensor:
        return torch.tensor([LEVELS[slot % BATCH] for slot in place.slots])

    maker = BatchMaker(
        family,
        pair.geometry,
        COLOR,
        torch.device("cpu"),
        null_text=case_of(name).sample(torch.zeros, 0),
        caption_dropout=0.0,
        draw_sigma=levels,
        encode_latents=None,
        encode_captions=None,
    )
    ledger = Ledger(folder / str(stage), ranks, 0.01)
    data: Any = Data([], set(), name)
    trainer = Trainer(settings, engine, None, maker, data, ledger, lambda text: None)
    data.share = trainer.share
    return trainer


def check(stage: int, ranks: Ranks, folder: Path) -> dict[str, Any]:
    trainer, request = trainer_for(stage, ranks, folder), StopRequest()
    data: Any = trainer.training
    data.broken = {3, 5, 6}
    draw = trainer.maker.draw_sigma

    def drawing(place: Place, size: tuple[int, int]) -> torch.Tensor:
        """The last rank is asked to stop while the gradients of a step are made."""
        if place.slots[0] // BATCH == ASKED_IN and ranks.rank == ranks.world - 1:
            request.reason = "SIGTERM"
        return draw(place, size)

    trainer.maker.draw_sigma = drawing
    told: list[Any] = []
    stops: list[str | None] = []
    try:
        for step in range(8):
            line, stop = trainer.take(step, data, request)
            told.append(line)
            stops.append(stop)
    except BadData as error:
        ended = {"ended": str(error), "updates": trainer.num_updates}
        return {"told": told, "stops": stops, **ended}
    return {"told": told}


def main() -> None:
    torch.set_num_threads(1)
    ranks, folder = dist.discover(), Path(sys.argv[1])
    dist.join(ranks, torch.device("cpu"), timeout=120)
    found = {stage: check(int(stage), ranks, folder) for stage in sys.argv[2:]}
    print("RESULT", json.dumps(found), flush=True)
    dist.end_process(0)


if __name__ == "__main__":
    main()
