"""Is this machine fit: packages, accelerator, memory, disk, launcher, and what a recipe names.

Nothing here raises: a package that is missing, or breaks when it is imported, is a line that says
so and what to do. For that reason nothing but the standard library is imported at the top.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from asymlift.errors import UserError
from asymlift.stages.doctor import machine as doctor_machine
from asymlift.stages.doctor import packages as doctor_packages
from asymlift.stages.doctor import recipe as doctor_recipe
from asymlift.stages.doctor.check import Check, brief

if TYPE_CHECKING:
    from asymlift.recipe import Recipe


WIDTH = 120  # of the table, where there is no terminal that has one


def examine(recipe: Recipe | None = None) -> list[Check]:
    """Look at everything, in the order in which one thing builds on another."""
    packages = [name for name in doctor_packages.TESTED if name != "python"]
    looks: list[tuple[str, Callable[[], Iterator[Check]]]] = [
        ("python", doctor_packages.python),
        *((name, doctor_packages.of_package(name)) for name in packages),
        ("optional packages", doctor_packages.extras),
        ("accelerator", doctor_machine.accelerator),
        ("deepspeed accelerator", doctor_machine.deepspeed_accelerator),
        ("collectives", doctor_machine.collectives),
        ("compiled operators", doctor_machine.compiled_operators),
        ("memory", doctor_machine.memory),
        ("disk", doctor_machine.disk),
        ("shared memory", doctor_machine.shared_memory),
        ("open files", doctor_machine.open_files),
        ("launcher", doctor_machine.launcher),
        *doctor_recipe.looks(recipe),
    ]
    return [check for name, look in looks for check in guarded(name, look)]


def is_fit(checks: list[Check]) -> bool:
    return all(check.status != "fail" for check in checks)


def as_json(checks: list[Check]) -> dict[str, Any]:
    return {"fit": is_fit(checks), "checks": [asdict(check) for check in checks]}


def render(checks: list[Check]) -> Any:
    """A rich table; what to do stands under what was found."""
    from rich.table import Table
    from rich.text import Text

    styles = {"ok": "green", "warn": "yellow", "fail": "bold red"}
    table = Table("", "what", "found", "tested or needed", box=None, pad_edge=False)
    for check in checks:
        found = Text(check.found)
        if check.remedy:
            found.append(f"\n-> {check.remedy}", style=styles[check.status])
        status = Text(check.status, style=styles[check.status])
        table.add_row(status, check.name, found, check.needed)
    return table


def guarded(name: str, look: Callable[[], Iterator[Check]]) -> list[Check]:
    """What a look found; what it raises, too, is something found."""
    found: list[Check] = []
    try:
        found.extend(look())
    except UserError as error:
        found.append(Check(name, "fail", str(error)))
    except (Exception, SystemExit) as error:
        found.append(Check(name, "fail", brief(error), remedy=f"reinstall what it names ({name})"))
    return found
