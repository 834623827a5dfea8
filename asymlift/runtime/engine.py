"""DeepSpeed behind a few verbs: forward and backward, and update. State is in `EngineState`."""

import logging
import math
import os
import sys
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from asymlift.runtime.dist import Ranks
from asymlift.runtime.engine_state import EngineState
from asymlift.runtime.layout import Layout
from asymlift.runtime.muon import Muon
from asymlift.runtime.optimizers import (
    OptimizerSettings,
    begin_state,
    build_optimizer,
    is_special,
)
from asymlift.runtime.parameters import Trainable

LOWER_PRECISION_MODULES = ["torch.nn.Linear", "torch.nn.Conv2d"]  # exact classes: not the maps

BUCKET = 500_000_000  # numbers that are reduced at once: DeepSpeed's default

Offload = Literal["none", "optimizer", "all"]
OFFLOADED = {
    "none": [],
    "optimizer": ["offload_optimizer"],
    "all": ["offload_optimizer", "offload_param"],
}
ON_HOST = {"optimizer": "optimizer", "all": "optimizer and weights"}
NAMES = {"adamw": "AdamW", "adamw_8bit": "AdamW with moments of 8 bits", "muon": "Muon"}


@dataclass(frozen=True)
class EngineSettings:
    """What DeepSpeed needs to know."""

    zero_stage: int
    offload: Offload
    micro_batch: int
    accumulation: int
    optimizer: OptimizerSettings
    autocast: torch.dtype | None  # of a full run: DeepSpeed then also communicates in it
    zero3: Mapping[str, int]  # stage-3 keys; tests set them to 0, or small models hide bugs


def import_deepspeed() -> Any:
    """Import DeepSpeed so that it needs no compiler and sees the accelerator that is there."""
    if not torch.cuda.is_available():
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
    os.environ.setdefault("DEEPSPEED_LOG_LEVEL", "warning")
    # DeepSpeed calls torch functions by names that torch is about to drop.
    warnings.filterwarnings("ignore", category=FutureWarning, module="torch.distributed")
    import deepspeed
    import deepspeed.ops

    # Its shared-memory operator is compiled at the first start; gloo does without.
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    deepspeed.utils.logger.setLevel("WARNING")
    deepspeed.utils.logger.addFilter(worth_saying)
    for handler in deepspeed.utils.logger.handlers:
        if handler.stream in (sys.stdout, sys.__stdout__):  # that is for the one JSON document
            handler.setStream(sys.__stderr__)
    return deepspeed


def worth_saying(record: logging.LogRecord) -> bool:
    """All but that an optimizer is not one of DeepSpeed's own: our tests run it under ZeRO."""
    return "untested optimizer" not in record.getMessage()


class Engine(EngineState):
    """One module under ZeRO, with an optimizer whose learning rates are set at every step."""

    def __init__(
        self, module: nn.Module, trainable: Trainable, settings: EngineSettings, ranks: Ranks
    ) -> None:
        self.deepspeed, self.settings, self.trainable = import_deepspeed(), settings, trainable
        self.left_out = 0  # non-finite updates of stage 0, where DeepSpeed looks at none
        device = next(iter(trainable.parameters.values())).device
        optimizer = build_optimizer(settings.optimizer, trainable, device)
        self.deepspeed.init_distributed(auto_mpi_discovery=False, verbose=False)
        self.inner, self.zero, *_ = self.deepspeed.initialize(
            model=module, optimizer=optimizer, config=self.config(device)
        )
        layout = Layout(self.stage, self.zero, trainable, ranks, self.inner.device)
        super().__init__(trainable, ranks, optimizer, settings.optimizer, layout)
        if isinstance(optimizer, Muon):
            optimizer.layout = layout
        for flat, pieces in layout.flats.items():
            name = next(iter(pieces))
            begin_state(optimizer, self.group_of(name), flat)

    @property
    def about(self) -> str:
        """What updates, and where."""
        kind, offload = NAMES[self.use.kind], self.settings.offload
        if self.use.kind == "muon":
            kind += f" for {len(self.trainable.matrices)} matrices and AdamW for the rest"
        place = f", {ON_HOST[offload]} on the host" if offload != "none" else ""
        return f"{kind}, ZeRO {self.stage}{place}"

    @property
    def stage(self) -> int:
        return self.settings.zero_stage

    def group_of(self, name: str) -> dict[str, Any]:
        """The optimizer's settings for a parameter."""
        key = (self.trainable.roles[name], is_special(self.use, self.trainable, name))
        groups = self.optimizer.param_groups
        return next(group for group in groups if (group["role"], group["special"]) == key)

    def config(self, device: torch.device) -> dict[str, Any]:
        use = self.settings
        host = {"device": "cpu", "pin_memory": device.type == "cuda"}
        config: dict[str, Any] = {
            "train_micro_batch_size_per_gpu": use.micro_batch,
            "gradient_accumulation_steps": use.accumulation,
            "zero_optimization": {
                "stage": use.zero_stage,
                # It is allocated whole, however little trains.
                "reduce_bucket_size": min(BUCKET, self.trainable.num_parameters),
                **dict.fromkeys(OFFLOADED[use.offload], host),
                **use.zero3,
            },
            "zero_allow_untested_optimizer": True,
            # torch's fused AdamW needs no compiler, and resumes exactly. DeepSpeed's is 1.5 times
            # as fast, but keeps powers of its betas that no checkpoint can bring back.
            "zero_force_ds_cpu_optimizer": False,
            "gradient_clipping": 0.0,  # ours is set at every update; theirs is 1 at stage 0
            "steps_per_print": None,
        }
        if use.autocast is not None:
            config["torch_autocast"] = {
                "enabled": True,
                "dtype": str(use.autocast).removeprefix("torch."),
                "lower_precision_safe_modules": LOWER_PRECISION_MODULES,
            }
        return config

    def forward_backward(self, batch: Any, loss_scale: float) -> dict[str, Tensor]:
        """One micro-batch; its gradients are added to those that are there."""
        loss, logged = self.inner(batch)
        self.inner.backward(loss * loss_scale)
        return {"loss": loss.detach(), **logged}

    def micro_step_done(self) -> None:
        """Between two micro-batches of one update."""
        self.inner.step()

    def update(self, learning_rates: Mapping[str, float], clip: float) -> float:
        """Take the optimizer step after the last micro-batch; returns the gradient norm."""
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rates[group["role"]]
        if self.stage == 0:
            norm = self.clip_replicated(clip)
            self.inner.step()
            return norm
        self.zero.clip_grad = clip
        self.inner.step()
        return float(self.inner.get_global_grad_norm())

    def clip_replicated(self, clip: float) -> float:
        """ZeRO stage 0 keeps whole gradients, and its norm to itself."""
        parameters = list(self.trainable.parameters.values())
        limit = clip if clip > 0 else float("inf")
        norm = float(torch.nn.utils.clip_grad_norm_(parameters, limit))
        if not math.isfinite(norm):
            self.inner.zero_grad()  # an optimizer leaves out what has no gradient
            self.left_out += 1
        return norm

    @property
    def num_skipped(self) -> int:
        """Updates that were left out because a gradient was not finite."""
        return int(self.inner.skipped_steps) + self.left_out
