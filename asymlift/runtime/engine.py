"""DeepSpeed behind a few verbs: forward and backward, update, read and write training state.

State is read and written by parameter name, as whole float32 tensors, so that it does not depend
on the ZeRO stage or the number of ranks. DeepSpeed's own checkpoints (pickle, by position) are
never used.
"""

import math
import os
import sys
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as td
from torch import Tensor, nn

from asymlift.runtime.dist import Ranks
from asymlift.runtime.parameters import Trainable, local_shard

MOMENTS = ("exp_avg", "exp_avg_sq")
LOWER_PRECISION_MODULES = ["torch.nn.Linear", "torch.nn.Conv2d"]  # exact classes: not the maps


@dataclass(frozen=True)
class EngineSettings:
    """What DeepSpeed needs to know."""

    zero_stage: int
    micro_batch: int
    accumulation: int
    betas: tuple[float, float]
    eps: float
    weight_decay: float
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
    for handler in deepspeed.utils.logger.handlers:
        if handler.stream in (sys.stdout, sys.__stdout__):  # that is for the one JSON document
            handler.setStream(sys.__stderr__)
    return deepspeed


class Engine:
    """One module under ZeRO, with an AdamW whose learning rates are set at every step."""

    def __init__(
        self, module: nn.Module, trainable: Trainable, settings: EngineSettings, ranks: Ranks
    ) -> None:
        self.deepspeed = import_deepspeed()
        self.settings, self.ranks, self.trainable = settings, ranks, trainable
        self.left_out = 0  # non-finite updates of stage 0, where DeepSpeed looks at none
        groups: dict[str, list[nn.Parameter]] = {}
        for name, parameter in trainable.parameters.items():
            groups.setdefault(trainable.roles[name], []).append(parameter)
        adamw = torch.optim.AdamW(
            [{"params": parameters, "role": role} for role, parameters in groups.items()],
            lr=0.0,
            betas=settings.betas,
            eps=settings.eps,
            weight_decay=settings.weight_decay,
        )
        self.deepspeed.init_distributed(auto_mpi_discovery=False, verbose=False)
        self.inner, self.optimizer, *_ = self.deepspeed.initialize(
            model=module, optimizer=adamw, config=self.config()
        )
        self.adamw: torch.optim.Optimizer = getattr(self.optimizer, "optimizer", self.optimizer)

    @property
    def stage(self) -> int:
        return self.settings.zero_stage

    def config(self) -> dict[str, Any]:
        use = self.settings
        config: dict[str, Any] = {
            "train_micro_batch_size_per_gpu": use.micro_batch,
            "gradient_accumulation_steps": use.accumulation,
            "zero_optimization": {"stage": use.zero_stage, **use.zero3},
            "zero_allow_untested_optimizer": True,
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
        for group in self.adamw.param_groups:
            group["lr"] = learning_rates[group["role"]]
        if self.stage == 0:
            norm = self.clip_replicated(clip)
            self.inner.step()
            return norm
        self.optimizer.clip_grad = clip
        self.inner.step()
        return float(self.inner.get_global_grad_norm())

    def clip_replicated(self, clip: float) -> float:
        """ZeRO stage 0 keeps whole gradients, and its norm to itself."""
        parameters = list(self.trainable.parameters.values())
        limit = clip if clip > 0 else float("inf")
        norm = float(torch.nn.utils.clip_grad_norm_(parameters, limit))
        if not math.isfinite(norm):
            self.inner.zero_grad()  # AdamW leaves out what has no gradient
            self.left_out += 1
        return norm

    @property
    def num_skipped(self) -> int:
        """Updates that were left out because a gradient was not finite."""
        return int(self.inner.skipped_steps) + self.left_out

    # --- state by name ------------------------------------------------------------------------

    @property
    def num_updates(self) -> int:
        steps = {float(state["step"]) for state in self.adamw.state.values() if "step" in state}
        assert len(steps) <= 1, f"AdamW's parameters disagree about the step: {sorted(steps)}"
        return int(steps.pop()) if steps else 0

    def shape_of(self, name: str) -> tuple[int, ...]:
        parameter = self.trainable.parameters[name]
        return tuple(getattr(parameter, "ds_shape", parameter.shape))

    def whole(self, name: str, shard: Tensor) -> Tensor:
        """A parameter-like tensor from what every rank holds of it. Every rank has to call."""
        parameter: Any = self.trainable.parameters[name]
        if not hasattr(parameter, "ds_shape"):
            return shard.detach()
        pieces = [torch.empty_like(shard) for _ in range(self.ranks.world)]
        td.all_gather(pieces, shard.contiguous())
        flat = torch.cat([piece.flatten() for piece in pieces])
        whole = flat[: parameter.ds_numel].view(parameter.ds_shape)
        assert whole.numel() == parameter.ds_numel, name
        return whole

    def shard(self, name: str, whole: Tensor) -> Tensor:
        """What this rank holds of a whole tensor; the inverse of `whole`."""
        parameter = self.trainable.parameters[name]
        local = local_shard(parameter)
        if not hasattr(parameter, "ds_shape"):
            return whole.to(local)
        padded = local.new_zeros(local.numel() * self.ranks.world)
        padded[: whole.numel()] = whole.flatten().to(local)
        start = self.ranks.rank * local.numel()
        return padded[start : start + local.numel()].view_as(local).clone()

    def weights(self) -> Iterator[tuple[str, Tensor]]:
        """Every trained tensor, whole, in float32, one at a time. Every rank has to iterate."""
        for name, parameter in self.trainable.parameters.items():
            yield name, self.whole(name, local_shard(parameter)).float()

    def moments(self) -> Iterator[tuple[str, Tensor]]:
        """AdamW's two averages of every trained tensor, as `exp_avg/NAME`, whole."""
        from deepspeed.utils import safe_get_full_optimizer_state

        self.link_moments()
        fresh = self.num_updates == 0
        for name, parameter in self.trainable.parameters.items():
            for key in MOMENTS:
                if fresh:  # every update so far was left out
                    yield f"{key}/{name}", torch.zeros(self.shape_of(name))
                elif self.stage == 0:
                    yield f"{key}/{name}", self.adamw.state[parameter][key]
                else:
                    yield f"{key}/{name}", safe_get_full_optimizer_state(parameter, key)

    def link_moments(self) -> None:
        """Let DeepSpeed find AdamW's state by parameter.

        ZeRO 1 and 2 do it after the step of the first parameter group, when the other groups have
        no state yet, and never again (0.19.8): their state could be neither read nor written.
        """
        if self.stage not in (1, 2) or self.num_updates == 0:
            return
        from deepspeed.utils import lazy_init_hp_params_optimizer_state

        groups = zip(
            self.optimizer.bit16_groups, self.optimizer.single_partition_of_fp32_groups, strict=True
        )
        for parameters, flat in groups:
            lazy_init_hp_params_optimizer_state(parameters, flat, self.adamw.state)

    @contextmanager
    def showing(self, shards: Mapping[str, Tensor]) -> Iterator[None]:
        """Inside, the next forward reads these weights; what AdamW updates is untouched."""
        before = {name: local_shard(self.trainable.parameters[name]).clone() for name in shards}
        try:
            self.show_shards(shards)
            yield
        finally:
            self.show_shards(before)

    @torch.no_grad()
    def show_shards(self, shards: Mapping[str, Tensor]) -> None:
        for name, shard in shards.items():
            parameter: Any = self.trainable.parameters[name]
            local_shard(parameter).copy_(shard)
            # Under ZeRO-3 small parameters stay whole between steps, beside their shards.
            if hasattr(parameter, "ds_shape") and parameter.numel() == parameter.ds_numel:
                parameter.data.copy_(self.whole(name, shard))

    @torch.no_grad()
    def set_weights(self, values: Mapping[str, Tensor]) -> None:
        """Overwrite trained weights, in what the next forward reads and in what AdamW updates."""
        from deepspeed.utils import safe_set_full_fp32_param

        for name, parameter in self.trainable.parameters.items():
            value = values[name].to(parameter.device, torch.float32)
            if self.stage == 3:
                with self.deepspeed.zero.GatheredParameters([parameter], modifier_rank=0):
                    if self.ranks.first:
                        parameter.data.copy_(value)
            else:
                parameter.data.copy_(value)
            if self.stage > 0:
                safe_set_full_fp32_param(parameter, value)

    @torch.no_grad()
    def set_moments(self, values: Mapping[str, Tensor], num_updates: int) -> None:
        """Overwrite AdamW's state. It has to exist: take one step first."""
        from deepspeed.utils import safe_set_full_optimizer_state

        self.link_moments()
        for name, parameter in self.trainable.parameters.items():
            for key in MOMENTS:
                value = values[f"{key}/{name}"].to(parameter.device, torch.float32)
                if self.stage == 0:
                    self.adamw.state[parameter][key].copy_(value)
                else:
                    safe_set_full_optimizer_state(parameter, value, key)
        for state in self.adamw.state.values():
            if "step" in state:
                state["step"].fill_(num_updates)
