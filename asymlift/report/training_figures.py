"""The figures of a finetune's page: which numbers of metrics.jsonl, and what good looks like."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class Figure:
    """Curves that are read together."""

    title: str
    meaning: str
    curves: Mapping[str, str] = field(default_factory=dict)  # key of metrics.jsonl -> its name
    parts: str = ""  # a key whose value is a list: one curve each
    names: Callable[[Mapping[str, Any]], list[str]] = lambda line: []  # of the parts, by a line
    log: bool = False
    counts: bool = False  # whole numbers
    may_be_off: bool = False  # left out where it is 0 all along


def levels_validated(line: Mapping[str, Any]) -> list[str]:
    return [f"noise {sigma:.2f}" for sigma in line.get("validation_sigma", [])]


def ranges_trained(line: Mapping[str, Any]) -> list[str]:
    count = len(line["loss_by_sigma"])
    return [f"noise {n / count:.2f} to {(n + 1) / count:.2f}" for n in range(count)]


FIGURES = (
    Figure(
        "validation loss",
        "Held-out samples with the same noise every time, so that it is smooth where the training "
        "loss is not; step 0 is the model as converted. Good: far below its first point, and "
        "still falling. Where it rises while the loss falls, the samples are learnt by heart: "
        "stop, take an earlier checkpoint, or add data. Nothing is taken off here, so it is larger "
        "than the loss below.",
        {"validation_loss": "flow", "validation_perceptual": "perceptual"},
        log=True,
    ),
    Figure(
        "validation loss by noise level",
        "Each level stands for an equal share of the noise levels that are trained on. Low noise "
        "is where detail is learnt, and should fall most; high noise is what the latent model "
        "could do already, and should stay where it is. Where a level rises, too few samples fall "
        "there: change finetune.time.shift.",
        parts="validation_by_level",
        names=levels_validated,
        log=True,
    ),
    Figure(
        "loss",
        "Mean over the good samples of a global batch, less what the reference explains. Good: a "
        "fall over the first hundreds of steps, then a slow one with much noise, as every batch "
        "draws other noise levels. Where it climbs or jumps, lower finetune.optimizer.lr or "
        "lengthen finetune.schedule.warmup.",
        {"loss": "loss", "loss_flow": "flow", "loss_perceptual": "perceptual"},
        log=True,
    ),
    Figure(
        "loss by noise level",
        "The training loss, told apart by noise, so that it shows where a jump comes from. Good: "
        "each falls or stays. A range without a curve was never drawn: finetune.time says how "
        "often which noise is.",
        parts="loss_by_sigma",
        names=ranges_trained,
        log=True,
    ),
    Figure(
        "control variate",
        "How far the student's error is the reference's error too: the coefficient, and the share "
        "of the error's energy that it explains. Good: well above 0. Both near 1 say that what is "
        "wrong is what the latent model gets wrong as well, and the student is not made to chase "
        "it; they fall as it learns what its reference does not know. Near 0 from the first step "
        "on, the reference is of no use: look at the R2 of the basis, and whether the latents "
        "belong to the pictures.",
        {"control": "mean coefficient", "explained": "explained share"},
    ),
    Figure(
        "gradient variance",
        "Of the last map's gradient, over the samples of a batch: as trained, and had the plain "
        "image been the target. Good: the first well below the second, which is what the "
        "reference is paid for. Where they are equal, loss.kind: flow trains as well for less.",
        {
            "gradient_variance": "variance reduced",
            "gradient_variance_plain": "without the reference",
        },
        log=True,
    ),
    Figure(
        "gradient norm",
        "Over everything that trains, before clipping. Good: level or slowly falling, with rare "
        "spikes that finetune.clip cuts off. Where it grows over hundreds of steps, lower "
        "finetune.optimizer.lr.",
        {"grad_norm": "before clipping"},
        log=True,
    ),
    Figure(
        "updates left out",
        "So many updates had no finite gradient and were left out. Good: none, or a few in "
        "a month. Each is named in logs/rank-*.log with its samples; where they come in rows, "
        "lower the learning rate.",
        {"skipped_updates": "updates"},
        counts=True,
    ),
    Figure(
        "samples that a pass leaves out",
        "The share that weighs too little (finetune.loss.skip_below) to be worth the reference's "
        "pass or the perceptual one. Good: the higher, the less a step costs, as long as the "
        "validation loss falls as before.",
        {
            "skipped_reference": "without the reference",
            "skipped_perceptual": "without the perceptual net",
        },
        may_be_off=True,
    ),
    Figure(
        "seconds per step",
        "Good: next to nothing waits for data. Where waiting is more than a tenth, raise "
        "data.workers, or let `asymlift prepare` cache latents and embeddings.",
        {"seconds_computing": "computing", "seconds_waiting_for_data": "waiting for data"},
    ),
    Figure(
        "learning rate",
        "Before the factors of optimizer.lr_scale. It should look as finetune.schedule says.",
        {"lr": "learning rate"},
    ),
)
