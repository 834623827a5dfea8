"""Where a recipe's parts are on this machine."""

import math
from dataclasses import asdict
from pathlib import Path

from asymlift.artifacts.diffusers_folder import DiffusersFolder
from asymlift.artifacts.lifted_folder import Lifted
from asymlift.errors import BadData, BadRecipe, Unavailable
from asymlift.families import find_family
from asymlift.families.base import TRANSFORMER, Config, Family, Geometry
from asymlift.families.refusals import distillation_warning, why_folder_refused, why_refused
from asymlift.recipe import Recipe
from asymlift.runtime import log, third_party

EMBEDDED = "embedded:"
MOST_SIZE = 4096  # of a latent cell, a patch, or a latent's channels; known ones stay below 200
# What comes of a config's values where they are not of the kind that they should be.
WRONG_VALUES = (TypeError, ValueError, KeyError, AttributeError, IndexError, ArithmeticError)


def base_folder(recipe: Recipe) -> Path:
    """The base model on this machine: a folder, or one that came with the package."""
    name = recipe.model.base
    if name.startswith(EMBEDDED):
        from asymlift.embedded import MODELS

        inside = name.removeprefix(EMBEDDED)
        if inside not in MODELS:
            known = ", ".join(MODELS)
            raise BadRecipe(f"model.base: no embedded model {inside!r}; there are {known}")
        return MODELS[inside]
    path = Path(name).expanduser()
    if not path.is_dir():
        raise Unavailable(
            f"model.base: {name}: no such folder. Nothing is downloaded unasked: fetch it first, "
            f"with `hf download OWNER/NAME --local-dir {name}`, or name the folder it is in"
        )
    return path


def named_family(recipe: Recipe) -> str:
    """What the recipe says; code of one's own can be imported then, and may import diffusers."""
    if ":" in recipe.model.family:
        third_party.prepare()
    return recipe.model.family


def family_of(recipe: Recipe, base: Path) -> tuple[Family, Geometry]:
    """What the base is, by its own configs or by the recipe; a poor start is told."""
    folder = DiffusersFolder(base)
    family = family_in(folder, named_family(recipe))
    warn_of_distillation(folder, family, recipe.model.base)
    return family, geometry_of(folder, family)


def family_in(folder: DiffusersFolder, name: str) -> Family:
    """The family of a pipeline folder; what cannot be ported is refused, and why.

    A family of one's own says itself what it is for.
    """
    if reason := why_folder_refused(folder.model_index):
        raise BadData(f"{folder.path}: {reason}")
    config = folder.config("transformer")
    family = find_family(name, folder.model_index, config)
    if ":" not in name:
        refuse_unportable(folder, family)
    return family


def refuse_unportable(folder: DiffusersFolder, family: Family) -> None:
    """End where no port of such a checkpoint is right, although its class is of a family."""
    config, scheduler = folder.config("transformer"), scheduler_config(folder)
    if reason := why_refused(family, config, scheduler, folder.model_index):
        raise BadData(f"{folder.path}: {reason}")


def check_lifted(lifted: Lifted, family: Family, base: str) -> None:
    """The same of a model that was lifted already, by whatever means; `base` is what it was."""
    if ":" in lifted.family:
        return
    folder = DiffusersFolder(lifted.folder)
    refuse_unportable(folder, family)
    warn_of_distillation(folder, family, base)


def warn_of_distillation(folder: DiffusersFolder, family: Family, called: str) -> None:
    if told := distillation_of(folder, family, called):
        log.warn(told)


def distillation_of(folder: DiffusersFolder, family: Family, called: str) -> str | None:
    """Why this checkpoint is a poor start; None if it is none."""
    config, scheduler = folder.config("transformer"), scheduler_config(folder)
    return distillation_warning(family, config, scheduler, folder.model_index, called)


def scheduler_config(folder: DiffusersFolder) -> Config:
    return folder.config("scheduler") if (folder.path / "scheduler").is_dir() else {}


def geometry_of(folder: DiffusersFolder, family: Family) -> Geometry:
    """The sizes of a model by its two configs, whose values may be of any kind."""
    transformer, vae = folder.config("transformer"), folder.config("vae")
    for name, config in ((TRANSFORMER, transformer), ("vae", vae)):
        listed, found_class = folder.components.get(name), config.get("_class_name")
        if listed and found_class and listed != found_class:
            raise BadData(
                f"{folder.path}: {name}/ is a {found_class}, but {folder.index.name} has a "
                f"{listed} there; take both from one model"
            )
    where = f"{folder.path}: the configs of transformer and VAE"
    try:
        found = family.geometry(transformer, vae)
    except BadData as error:
        raise BadData(f"{folder.path}: {error}") from error
    except WRONG_VALUES as error:
        reason = f"{type(error).__name__}: {error}"
        raise BadData(f"{where} do not give the sizes of a {family.name} ({reason})") from error
    sizes = asdict(found).items()
    wrong = [name for name, size in sizes if type(size) is not int or not 0 < size <= MOST_SIZE]
    if wrong:
        raise BadData(
            f"{where} give no {' and no '.join(wrong)} that is a whole number from 1 to {MOST_SIZE}"
        )
    return found


def base_shift_of(folder: DiffusersFolder, family: Family, num_tokens: int) -> float:
    """The time shift that a model's scheduler has for so many tokens."""
    if family.own_scheduler is not None and "scheduler" not in folder.components:
        return family.base_shift(family.own_scheduler, num_tokens)
    path = folder.folder("scheduler") / "scheduler_config.json"
    try:
        found = family.base_shift(folder.config("scheduler"), num_tokens)
    except WRONG_VALUES as error:
        reason = f"{type(error).__name__}: {error}"
        raise BadData(f"{path}: does not give a time shift ({reason})") from error
    if not 0 < found < math.inf:
        raise BadData(f"{path}: gives a time shift of {found}")
    return found


def basis_path(recipe: Recipe) -> Path:
    return recipe.run_folder / "basis.safetensors"


def lifted_path(recipe: Recipe) -> Path:
    return recipe.run_folder / "lifted"


def checkpoints_path(recipe: Recipe) -> Path:
    return recipe.run_folder / "checkpoints"


def needed(path: Path, command: str) -> Path:
    """A path that an earlier command makes."""
    if not path.exists():
        raise Unavailable(f"{path}: not there yet; run `asymlift {command}` on this recipe first")
    return path
