"""What to say when memory runs out: what was held, and what to change."""

from itertools import islice
from typing import Literal

import torch

from asymlift.maths.zero_memory import Device
from asymlift.recipe import Recipe
from asymlift.stages.plan import SUGGESTED, cheapest, describe_changes, gib
from asymlift.stages.plan_memory import Planner, alternatives
from asymlift.stages.plan_model import blueprint_of


def memory_advice(recipe: Recipe, world: int, phase: str) -> list[str]:
    """A few lines for a run of so many ranks that ended in `phase`. It never raises.

    For a model of 9 B numbers it takes half a minute of a CPU and no memory of a GPU.
    """
    try:
        return estimated(recipe, world, phase)
    except Exception:  # whatever is wrong here must not hide what went wrong there
        found = islice(alternatives(recipe.finetune, world), SUGGESTED)
        return [
            f"out of memory in {phase}; the cheapest changes, not estimated:",
            *(f"  --set {key}={value} (costs {cost})" for key, value, cost, _ in found),
        ]


def estimated(recipe: Recipe, world: int, phase: str) -> list[str]:
    device: Device = "cuda" if torch.cuda.is_available() else "cpu"
    planner = Planner(recipe, blueprint_of(recipe), world, device=device)
    own = planner.own
    held = [f"{part} {gib(size)}" for part, size in own.resident.items() if size]
    comes = [f"{what} {gib(size)}" for what, size in own.phases.items()]
    height, width = planner.size
    return [
        f"out of memory in {phase}. By estimate a rank holds, in GiB: {', '.join(held)};",
        f"beside that one of: {', '.join(comes)} ({settings_of(recipe)}, {width} x {height})",
        "the cheapest changes:",
        *describe_changes(cheapest(planner, own), None),
    ]


def settings_of(recipe: Recipe) -> str:
    use = recipe.finetune
    return f"micro_batch {use.micro_batch}, ZeRO stage {use.zero.stage}"
