"""Where a recipe's parts are on this machine."""

import math
from dataclasses import asdict
from pathlib import Path

from asymlift.artifacts.diffusers_folder import DiffusersFolder
from asymlift.errors import BadData, BadRecipe, Unavailable
from asymlift.families import find_family
from asymlift.families.base import Family, Geometry
from asymlift.recipe import Recipe
from asymlift.runtime import third_party

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
    """What the base is, by its own configs or by the recipe."""
    folder = DiffusersFolder(base)
    config = folder.config("transformer")
    family = find_family(named_family(recipe), folder.model_index, config)
    return family, geometry_of(folder, family)


def geometry_of(folder: DiffusersFolder, family: Family) -> Geometry:
    """The sizes of a model by its two configs, whose values may be of any kind."""
    transformer, vae = folder.config("transformer"), folder.config("vae")
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
