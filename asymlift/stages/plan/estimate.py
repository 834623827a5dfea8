"""plan: what a finetune will take of memory, disk and data, before anything is spent.

The real model is built without weights and takes one real step on tensors without numbers.
"""

from dataclasses import asdict, dataclass
from typing import Any

from asymlift.artifacts.files import human_bytes
from asymlift.recipe import FinetuneSection, Recipe
from asymlift.runtime.dist import Ranks
from asymlift.stages.finetune.start import accumulation_for
from asymlift.stages.plan.data import DataFacts, Disk, disk_of, look_at_data
from asymlift.stages.plan.memory import (
    CONTEXT,
    FRAGMENTATION,
    GIB,
    RANKS_PER_NODE,
    Change,
    Memory,
    Planner,
)
from asymlift.stages.plan.model import blueprint_of
from asymlift.stages.sizes import Sizes

SUGGESTED = 3
WORTH_SAYING = 0.01  # of what is there: changes that save less are left out


@dataclass(frozen=True)
class PlanReport:
    """Bytes and counts; nothing here was measured on a GPU."""

    recipe: str
    model: str
    gpus: int
    gpu_memory: int
    trained: dict[str, int]  # numbers by role
    size: tuple[int, int]  # of the largest pictures
    tokens: int
    micro_batch: int
    accumulation: int
    steps: int
    seen: int  # samples
    epochs: float | None
    data: DataFacts
    disk: Disk
    activations: dict[str, dict[str, int]]  # without and with gradient checkpointing
    memory: tuple[Memory, ...]
    fits: bool
    changes: tuple[Change, ...]  # of a recipe that does not fit

    @property
    def own(self) -> Memory:
        return next(memory for memory in self.memory if memory.own)


def plan(recipe: Recipe, gpus: int, gpu_memory: float) -> PlanReport:
    """`gpu_memory` in GiB."""
    settings, room = recipe.finetune, round(gpu_memory * GIB)
    accumulation = accumulation_for(settings, Ranks(0, gpus, 0))
    blueprint = blueprint_of(recipe)
    data = look_at_data(recipe, blueprint.geometry.pixel_patch)
    sizes = Sizes(blueprint.family, blueprint.geometry, blueprint.config, blueprint.folder.path)
    sizes.check_recipe(recipe, stored=data.size is not None)
    planner = Planner(
        recipe,
        blueprint,
        gpus,
        size=data.size,
        online=(data.text_online, data.latents_online),
    )
    memory = tuple(planner.columns())
    own = next(one for one in memory if one.own)
    fits = own.needed <= room
    groups = planner.groups(settings)
    trained = sum(count for count, _ in groups)
    # Checkpoints hold moments of 8 bits in float32, too.
    state = 8.0 if settings.optimizer.kind == "adamw_8bit" else weighted(groups)
    return PlanReport(
        recipe=recipe.name,
        model=blueprint.source,
        gpus=gpus,
        gpu_memory=room,
        trained=planner.model(settings).roles,
        size=planner.size,
        tokens=planner.grid[0] * planner.grid[1],
        micro_batch=settings.micro_batch,
        accumulation=accumulation,
        steps=settings.steps,
        seen=settings.steps * settings.batch,
        epochs=settings.steps * settings.batch / data.samples if data.samples else None,
        data=data,
        disk=disk_of(recipe, blueprint, trained, state, planner.size),
        activations={
            word: of_pass(planner, settings, checkpointing)
            for word, checkpointing in (("without", False), ("with", True))
        },
        memory=memory,
        fits=fits,
        changes=() if fits else cheapest(planner, own),
    )


def weighted(groups: list[tuple[int, float]]) -> float:
    return sum(count * width for count, width in groups) / sum(count for count, _ in groups)


def of_pass(planner: Planner, settings: FinetuneSection, checkpointing: bool) -> dict[str, int]:
    """What one micro-batch holds beside weights and gradients."""
    step = planner.step(settings.model_copy(update={"gradient_checkpointing": checkpointing}))
    return {
        "kept by the student": step.student,
        "reference pass, beside it": step.reference,
        "perceptual term, beside it": step.perceptual,
        "at the highest": step.peak,
    }


def cheapest(planner: Planner, own: Memory) -> tuple[Change, ...]:
    """The first few changes that are worth it, in the order of what they cost."""
    found = []
    for change in planner.changes():
        if change.saves > WORTH_SAYING * own.needed:
            found.append(change)
        if len(found) == SUGGESTED:
            break
    return tuple(found)


# ---- what is printed ---------------------------------------------------------------------------


def as_json(report: PlanReport) -> dict[str, Any]:
    found = asdict(report)
    for column, memory in zip(found["memory"], report.memory, strict=True):
        column |= {
            "highest": memory.highest,
            "needed": memory.needed,
            "fits": memory.needed <= report.gpu_memory,
        }
    return found


def render(report: PlanReport) -> list[str]:
    return [
        *about(report),
        "",
        *table(report),
        "",
        *passes(report),
        "",
        *on_disk(report),
        "",
        *verdict(report),
    ]


def about(report: PlanReport) -> list[str]:
    height, width = report.size
    trained = ", ".join(f"{role} {millions(count)}" for role, count in report.trained.items())
    epochs = "" if report.epochs is None else f", {report.epochs:.1f} epochs"
    known = "" if report.data.samples is None else f", {report.data.samples:,} samples"
    encoders = [
        word
        for word, stays in (
            ("text encoders", report.data.text_online),
            ("VAE", report.data.latents_online),
        )
        if stays
    ]
    stay = f"; {' and '.join(encoders)} stay on the GPU" if encoders else ""
    return [
        f"model   {report.model}",
        f"trains  {trained}",
        f"data    {report.data.note}{known}{stay}",
        f"step    {report.gpus} GPUs x {report.micro_batch} x {report.accumulation} accumulated; "
        f"largest pictures {width} x {height}: {report.tokens:,} tokens each",
        f"run     {report.steps:,} steps, {report.seen:,} samples{epochs}",
    ]


def millions(count: int) -> str:
    return f"{count / 1e6:,.1f} M" if count < 1e9 else f"{count / 1e9:,.2f} B"


def gib(count: int) -> str:
    return f"{count / GIB:.2f}" if count < GIB else f"{count / GIB:.1f}"


def table(report: PlanReport) -> list[str]:
    """Parts below each other, settings beside each other; the recipe's own is marked."""
    columns = report.memory
    heads = [f"{m.label}{' *' if m.own else ''}".split(", ") for m in columns]
    rows: list[tuple[str, list[str]]] = [
        ("GiB per GPU, ZeRO", [head[0] for head in heads]),
        ("", [head[1] if len(head) > 1 else "" for head in heads]),
    ]
    for part in columns[0].resident:
        values = [memory.resident[part] for memory in columns]
        if any(values):
            rows.append((part, [gib(value) if value else "-" for value in values]))
    for phase in columns[0].phases:
        values = [memory.phases[phase] for memory in columns]
        rows.append((f"+ {phase}", [gib(value) for value in values]))
    rows += [
        ("before training, rank 0", [gib(memory.start) for memory in columns]),
        ("highest", [gib(memory.highest) for memory in columns]),
        ("margin", [gib(memory.margin) for memory in columns]),
        ("needed", [gib(memory.needed) for memory in columns]),
        (
            f"of {report.gpu_memory / GIB:g}",
            ["fits" if m.needed <= report.gpu_memory else "TOO MUCH" for m in columns],
        ),
        (
            f"host, per node of {min(report.gpus, RANKS_PER_NODE)}",
            [gib(memory.host) for memory in columns],
        ),
    ]
    label = max(len(name) for name, _ in rows)
    widths = [max(len(values[i]) for _, values in rows) for i in range(len(columns))]
    lines = [
        f"{name:<{label}}  "
        + "  ".join(f"{value:>{width}}" for value, width in zip(values, widths, strict=True))
        for name, values in rows
    ]
    return [
        *(line.rstrip() for line in lines),
        "* as in the recipe. Of the rows with + the largest counts. The margin is assumed, not "
        f"measured: {CONTEXT / GIB:g} GiB",
        f"  for CUDA, NCCL and workspaces, and {FRAGMENTATION:.0%} of what comes and goes, for "
        "fragmentation.",
    ]


def passes(report: PlanReport) -> list[str]:
    without, within = report.activations["without"], report.activations["with"]
    label = max(map(len, without))
    return [
        f"{'one micro-batch, GiB':<{label}}  plain  gradient checkpointing",
        *(f"{name:<{label}}  {gib(without[name]):>5}  {gib(within[name]):>5}" for name in without),
    ]


def on_disk(report: PlanReport) -> list[str]:
    disk = report.disk
    lines = [
        f"disk    checkpoints {disk.checkpoints} x {human_bytes(disk.checkpoint)} = "
        f"{human_bytes(disk.all_checkpoints)}; {human_bytes(disk.free)} are free",
    ]
    if disk.lifted is not None:
        lines.append(f"        lifted model {human_bytes(disk.lifted)}, less what is hard-linked")
    if report.data.bytes_on_disk is not None:
        lines.append(f"        shards {human_bytes(report.data.bytes_on_disk)}")
    elif disk.cached_per_sample is not None:
        lines.append(
            f"        prepare caches up to {human_bytes(disk.cached_per_sample)} a sample beside "
            "its picture; `asymlift prepare --estimate` weighs both"
        )
    return lines


def verdict(report: PlanReport) -> list[str]:
    own, room = report.own, report.gpu_memory
    if report.fits:
        left = room - own.needed
        return [f"fits: {gib(own.needed)} of {room / GIB:g} GiB, {gib(left)} are left"]
    lines = [f"does not fit: {gib(own.needed - room)} GiB too much. The cheapest changes:"]
    return lines + describe_changes(report.changes, room)


def describe_changes(changes: tuple[Change, ...], room: int | None) -> list[str]:
    lines = []
    for change in changes:
        enough = room is not None and change.needed <= room
        lines.append(
            f"  --set {change.override}: saves {gib(change.saves)} GiB"
            f"{', which is enough' if enough else ''} (costs {change.cost})"
        )
    return lines or ["  none is left: more GPUs, or a smaller data.resize.sides"]
