"""What a finetune holds on every device and node, by part and by phase; and what to change.

Traces take seconds, so each is made once: `Planner` remembers them by what they depend on.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from asymlift.data.buckets import buckets
from asymlift.maths.zero_memory import (
    Device,
    Weights,
    ZeroMemory,
    ZeroSettings,
    zero_memory,
)
from asymlift.model.ema import LARGE
from asymlift.model.footprint import StepFootprint
from asymlift.recipe import FinetuneSection, Recipe
from asymlift.runtime.engine import BUCKET, LOWER_PRECISION_MODULES
from asymlift.runtime.optimizers import OptimizerSettings, is_special
from asymlift.stages.open_data import fit_of
from asymlift.stages.plan.model import Blueprint, Built, build, trace, trace_sampling

GIB = 2**30
RANKS_PER_NODE = 8
# Not measured: what the driver, NCCL and the libraries' workspaces take, and how much of what comes
# and goes is lost between blocks.
CONTEXT, FRAGMENTATION = 3 * GIB // 2, 0.08
PROCESS = 2 * GIB  # of the host: Python, libraries and a few samples ahead, per rank
LIVE, PREFETCH, PERSISTENT = 1_000_000_000, 50_000_000, 100_000  # numbers: DeepSpeed's defaults
STATE_BYTES = {"adamw": 8.0, "adamw_8bit": 2 + 8 / 256, "muon": 4.0}  # of special numbers


@dataclass(frozen=True)
class Limits:
    """DeepSpeed's numbers, which tests set to 0 so that small models behave like large ones."""

    bucket: int = BUCKET
    live: int = LIVE + PREFETCH
    persistent: int = PERSISTENT


@dataclass(frozen=True)
class Memory:
    """Bytes of one setting: per device, and per node on the host."""

    label: str
    own: bool  # the recipe's
    resident: dict[str, int]  # part -> bytes that stay
    phases: dict[str, int]  # beside those, while ...
    start: int  # of rank 0 before training: encoders, and the base for the first preview
    margin: int
    host: int

    @property
    def highest(self) -> int:
        return max(sum(self.resident.values()) + max(self.phases.values()), self.start)

    @property
    def needed(self) -> int:
        return self.highest + self.margin


class Planner:
    """Answers what settings take on so many ranks."""

    def __init__(
        self,
        recipe: Recipe,
        blueprint: Blueprint,
        world: int,
        *,
        device: Device = "cuda",
        limits: Limits = Limits(),
        size: tuple[int, int] | None = None,  # of the largest pictures; None: by data.resize
        online: tuple[bool, bool] = (False, False),  # whether text, and latents, are encoded
    ) -> None:
        self.recipe, self.blueprint, self.world, self.device = recipe, blueprint, world, device
        self.limits = limits
        self.size = size or self.largest_size()
        self.text_online, self.latents_online = online
        self.built: dict[Any, Built] = {}
        self.steps: dict[Any, StepFootprint] = {}
        self.samplings: dict[Any, int] = {}

    def largest_size(self) -> tuple[int, int]:
        """The size with most pixels that data.resize allows; of equals, the squarest."""
        fit = fit_of(self.recipe.data.resize, self.blueprint.geometry.pixel_patch)
        sizes = [size for group in buckets(fit).values() for size in group]
        return max(sizes, key=lambda size: (size[0] * size[1], min(size)))

    @property
    def grid(self) -> tuple[int, int]:
        p = self.blueprint.geometry.pixel_patch
        return self.size[0] // p, self.size[1] // p

    def model(self, settings: FinetuneSection) -> Built:
        key = (settings.gradient_checkpointing, str(settings.train), str(settings.loss))
        if key not in self.built:
            self.built[key] = build(self.recipe, self.blueprint, settings)
        return self.built[key]

    def step(self, settings: FinetuneSection) -> StepFootprint:
        """The trace of a micro-batch. A built step is used up by it: its hooks stay."""
        key = (
            settings.gradient_checkpointing,
            str(settings.train),
            str(settings.loss),
            settings.micro_batch,
        )
        if key not in self.steps:
            self.steps[key] = trace(
                build(self.recipe, self.blueprint, settings),
                micro_batch=settings.micro_batch,
                grid=self.grid,
                length=self.recipe.model.text_length,
                device=self.device,
            )
        return self.steps[key]

    def sampling(self, settings: FinetuneSection) -> int:
        """One evaluation of a preview's batch."""
        use, key = settings.preview, (str(settings.train), str(settings.loss))
        if use is None:
            return 0
        if key not in self.samplings:
            p, drawn = self.blueprint.geometry.pixel_patch, self.recipe.sample
            count = len(use.prompts) if isinstance(use.prompts, list) else drawn.batch * self.world
            self.samplings[key] = trace_sampling(
                self.model(settings),
                batch=min(drawn.batch, -(-count // self.world)),
                grid=(drawn.height // p, drawn.width // p),
                length=self.recipe.model.text_length,
                device=self.device,
            )
        return self.samplings[key]

    # --- weights ------------------------------------------------------------------------------

    def weights(self, settings: FinetuneSection) -> Weights:
        built = self.model(settings)
        sizes = [p.numel() for p in built.trainable.parameters.values()]
        return Weights(
            frozen=sum(built.frozen.values()),
            groups=tuple(count for count, _ in self.groups(settings)),
            largest=max(sizes),
            gathered=self.gathered(built),
        )

    def groups(self, settings: FinetuneSection) -> list[tuple[int, float]]:
        """Numbers, and bytes of the optimizer's state for each, of the optimizer's groups."""
        use, trainable = settings.optimizer, self.model(settings).trainable
        kind = OptimizerSettings(use.kind, use.betas, use.eps, use.weight_decay, use.momentum)
        counts: dict[tuple[str, bool], int] = {}
        for name, parameter in trainable.parameters.items():
            key = trainable.roles[name], is_special(kind, trainable, name)
            counts[key] = counts.get(key, 0) + parameter.numel()
        return [
            (count, STATE_BYTES[use.kind if special else "adamw"])
            for (_, special), count in counts.items()
        ]

    def gathered(self, built: Built) -> int:
        """Stage 3 keeps whole what it used last, up to a number; at least a module's own."""
        if self.world == 1:  # a share is the whole
            return 0
        modules = [list(m.parameters(recurse=False)) for m in built.step.modules()]
        sizes = [[(p.numel(), p.element_size()) for p in module] for module in modules]
        numbers = sum(count for module in sizes for count, _ in module)
        total = sum(count * width for module in sizes for count, width in module)
        largest = max(sum(count * width for count, width in module) for module in sizes)
        small = sum(
            count * width
            for module in sizes
            for count, width in module
            if count <= self.limits.persistent
        )
        kept = round(total * min(1.0, self.limits.live / max(numbers, 1)))
        return max(kept, largest) + small

    def zero(self, settings: FinetuneSection) -> ZeroMemory:
        groups = self.groups(settings)
        numbers = sum(count for count, _ in groups)
        lower = settings.train == "full" and settings.precision == "bfloat16"
        use = ZeroSettings(
            stage=settings.zero.stage,
            world=self.world,
            accumulation=max(settings.batch // (settings.micro_batch * self.world), 1),
            bucket=min(self.limits.bucket, numbers),
            state_bytes=sum(count * width for count, width in groups) / numbers,
            offload=settings.zero.offload,
            dtypes=self.travelling(settings) if lower else (4,),
        )
        return zero_memory(self.weights(settings), use, self.device)

    def travelling(self, settings: FinetuneSection) -> tuple[int, ...]:
        """Bytes of the dtypes of a full run's gradients: low where DeepSpeed computes low."""
        found = set()
        for module in self.model(settings).step.student.modules():
            kind = f"torch.nn.{type(module).__name__}"
            exact = type(module).__module__.startswith("torch.nn")
            low = exact and kind in LOWER_PRECISION_MODULES
            found |= {2 if low else 4 for p in module.parameters(recurse=False) if p.requires_grad}
        return tuple(sorted(found))

    # --- totals -------------------------------------------------------------------------------

    def memory(self, settings: FinetuneSection, label: str = "", own: bool = False) -> Memory:
        zero, built, step = self.zero(settings), self.model(settings), self.step(settings)
        average = self.average(settings)
        net = built.perceptual
        encoders = self.blueprint.encoder_bytes
        resident = {
            "frozen weights": zero.frozen,
            "trained weights": zero.trained,
            "their second copy (ZeRO)": zero.master,
            "optimizer state": zero.optimizer,
            "gradients kept": zero.gradient_buffer,
            "moving average": average,
            "ZeRO buffers": zero.buffers,
            "perceptual net": sum(p.numel() * p.element_size() for p in net.parameters())
            if net
            else 0,
            "encoders that stay": encoders if self.text_online or self.latents_online else 0,
        }
        phases = {
            "forward and backward": zero.pass_peak(step.curve),
            "update": zero.update,
        }
        if settings.preview is not None:
            phases["previews"] = self.sampling(settings) + zero.gathered
        if settings.ema is not None and (settings.preview or settings.validation):
            phases["showing the average"] = self.exchange(settings)
        base = sum(built.frozen.values()) if settings.preview else 0
        comes_and_goes = max(phases.values())
        on_gpu = self.device == "cuda"
        return Memory(
            label=label,
            own=own,
            resident=resident,
            phases=phases,
            start=encoders + base + (self.sampling(settings) if base else 0),
            margin=CONTEXT + round(FRAGMENTATION * comes_and_goes) if on_gpu else 0,
            host=min(self.world, RANKS_PER_NODE)
            * (max(zero.host, self.loading(settings)) + PROCESS),
        )

    def average(self, settings: FinetuneSection) -> int:
        """As model/ema.py shares it out."""
        if settings.ema is None:
            return 0
        whole = 4 * self.weights(settings).trained
        large = whole > LARGE
        wanted = settings.ema.shard == "always" or (settings.ema.shard == "auto" and large)
        return -(-whole // self.world) if settings.zero.stage == 3 or wanted else whole

    def exchange(self, settings: FinetuneSection) -> int:
        """The average and the weights change places one tensor at a time."""
        largest = 4 * self.weights(settings).largest
        return -(-largest // self.world) if settings.zero.stage == 3 else largest

    def loading(self, settings: FinetuneSection) -> int:
        """What a rank's host holds of the base, in float32, before it draws the first preview.

        What trains is mapped from the files, which ranks share, until it is on the device.
        """
        if settings.precision == "bfloat16" or settings.preview is None:
            return 0
        return 4 * sum(p.numel() for p in self.model(settings).step.student.net.parameters())

    # --- what could be changed ------------------------------------------------------------------

    def columns(self) -> list[Memory]:
        """Every ZeRO stage, offload where it can be, and the recipe's own."""
        own = self.recipe.finetune
        found = []
        for stage, offload in [*((n, "none") for n in range(4)), (2, "optimizer"), (3, "all")]:
            zero = own.zero.model_copy(update={"stage": stage, "offload": offload})
            label = f"stage {stage}" + ("" if offload == "none" else f", offload {offload}")
            settings = own.model_copy(update={"zero": zero})
            found.append(self.memory(settings, label, zero == own.zero))
        if not any(memory.own for memory in found):
            label = f"stage {own.zero.stage}, offload {own.zero.offload}"
            found.append(self.memory(own, label, own=True))
        return found

    @cached_property
    def own(self) -> Memory:
        return self.memory(self.recipe.finetune, "recipe", own=True)

    def changes(self) -> Iterator["Change"]:
        """What takes less memory, the cheapest in time and quality first."""
        for key, value, cost, settings in alternatives(self.recipe.finetune, self.world):
            after = self.memory(settings)
            yield Change(f"{key}={value}", cost, self.own.needed - after.needed, after.needed)


@dataclass(frozen=True)
class Change:
    """One override, what it costs, and what it saves alone."""

    override: str
    cost: str
    saves: int
    needed: int


Alternative = tuple[str, Any, str, FinetuneSection]


def alternatives(own: FinetuneSection, world: int) -> Iterator[Alternative]:
    """Overrides of `finetune`, in the order of what they cost."""

    def changed(**update: Any) -> FinetuneSection:
        return own.model_copy(update=update)

    stage, offload = own.zero.stage, own.zero.offload
    if own.ema and own.ema.shard != "always" and stage < 3 and world > 1:
        ema = own.ema.model_copy(update={"shard": "always"})
        yield "finetune.ema.shard", "always", "nothing", changed(ema=ema)
    if stage < 2 and world > 1:
        zero = own.zero.model_copy(update={"stage": 2})
        yield "finetune.zero.stage", 2, "nothing", changed(zero=zero)
    if own.micro_batch > 1:
        half = largest_divisor(own.micro_batch)
        cost = "a little time: the batch stays, in more and smaller passes"
        yield "finetune.micro_batch", half, cost, changed(micro_batch=half)
    if not own.gradient_checkpointing:
        cost = "a third more time: activations are computed twice"
        yield (
            "finetune.gradient_checkpointing",
            "true",
            cost,
            changed(gradient_checkpointing=True),
        )
    if own.optimizer.kind == "adamw":
        optimizer = own.optimizer.model_copy(update={"kind": "adamw_8bit"})
        cost = "coarser moments; needs bitsandbytes"
        yield "finetune.optimizer.kind", "adamw_8bit", cost, changed(optimizer=optimizer)
    if stage < 3 and world > 1:
        zero = own.zero.model_copy(update={"stage": 3})
        cost = "time: weights travel in every pass"
        yield "finetune.zero.stage", 3, cost, changed(zero=zero)
    if offload == "none" and stage > 0:
        zero = own.zero.model_copy(update={"offload": "optimizer"})
        cost = "time: the update runs on the host"
        yield "finetune.zero.offload", "optimizer", cost, changed(zero=zero)
    if own.train != "full" and own.train.lora is not None and own.train.lora.rank > 1:
        lora = own.train.lora.model_copy(update={"rank": own.train.lora.rank // 2})
        train = own.train.model_copy(update={"lora": lora})
        cost = "another model: less can be learned"
        yield "finetune.train.lora.rank", lora.rank, cost, changed(train=train)


def largest_divisor(count: int) -> int:
    return next(divisor for divisor in range(count // 2, 0, -1) if count % divisor == 0)
