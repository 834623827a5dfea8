"""Which sizes of pictures a model can draw: asked before anything is encoded or trained."""

import math
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path

from asymlift.artifacts.diffusers_folder import DiffusersFolder
from asymlift.data.buckets import Bucket, Fit, buckets
from asymlift.errors import BadData, BadRecipe
from asymlift.families.base import TRANSFORMER, Config, Family, Geometry
from asymlift.recipe import Recipe
from asymlift.stages.locate import WRONG_VALUES
from asymlift.stages.open_data import fit_of


@dataclass(frozen=True)
class Sizes:
    """A model, as far as it decides which sizes it draws."""

    family: Family
    geometry: Geometry
    config: Config  # of its transformer
    place: Path  # of that config

    @classmethod
    def of(cls, folder: DiffusersFolder, family: Family, geometry: Geometry) -> "Sizes":
        place = folder.folder(TRANSFORMER) / "config.json"
        return cls(family, geometry, folder.config(TRANSFORMER), place)

    def why_not(self, size: Bucket) -> str | None:
        """Why it cannot draw a picture of (height, width) pixels, in whole patches; or None."""
        p = self.geometry.pixel_patch
        grid = size[0] // p, size[1] // p
        try:
            reason = self.family.why_not_grid(self.config, grid)
        except WRONG_VALUES as error:
            what = f"{type(error).__name__}: {error}"
            raise BadData(f"{self.place}: does not say what sizes it draws ({what})") from error
        if reason is None:
            return None
        return (
            f"{size[1]} x {size[0]} pixels are {grid[0]} x {grid[1]} tokens, which "
            f"{self.family.name} cannot draw, as {reason}"
        )

    def check_resize(self, fit: Fit) -> None:
        """Refuse a `data.resize` of which some size cannot be drawn."""
        sizes = [size for group in buckets(fit).values() for size in group]
        refused = [size for size in sizes if self.why_not(size)]
        if not refused:
            return
        worst = max(refused, key=lambda size: (max(size), size))
        raise BadRecipe(
            f"data.resize: {len(refused)} of its {len(sizes)} sizes cannot be drawn: "
            f"{self.why_not(worst)}; {self.remedy(fit)}"
        )

    def remedy(self, fit: Fit) -> str:
        """The first change of `data.resize` after which every size that is left can be drawn."""
        for said, other in changes(fit, self.fine):
            if all(self.fine(size) for group in buckets(other).values() for size in group):
                return f"set data.resize.{said}"
        return "choose other data.resize.sides, and a smaller data.resize.max_aspect"

    def fine(self, size: Bucket) -> bool:
        return self.why_not(size) is None

    def check_stored(self, sizes: Iterable[Iterable[int]], owner: str) -> None:
        """Refuse pictures that keep their (height, width), which a recipe does not change."""
        for height, width in {(height, width) for height, width in sizes}:
            if reason := self.why_not((height, width)):
                raise BadData(
                    f"{owner}: {reason}; other data.resize.sides or a smaller "
                    "data.resize.max_aspect would help, of what was prepared once it is again"
                )

    def check_drawn(self, height: int, width: int) -> None:
        """Refuse a size of samples and previews."""
        if reason := self.why_not((height, width)):
            raise BadRecipe(f"{reason}; change sample.height or sample.width")

    def check_recipe(self, recipe: Recipe, *, stored: bool) -> None:
        """What `finetune` will show the model; `stored`: the pictures may keep their sizes."""
        if recipe.finetune.preview is not None:
            self.check_drawn(recipe.sample.height, recipe.sample.width)
        if not stored or "resize" in recipe.data.model_fields_set:
            self.check_resize(fit_of(recipe.data.resize, self.geometry.pixel_patch))


def changes(fit: Fit, fine: Callable[[Bucket], bool]) -> Iterator[tuple[str, Fit]]:
    """What might help, in words; what leaves out most pictures, a smaller aspect, comes last."""
    common = math.gcd(*fit.sides)
    for step in range(fit.patch, common + 1, fit.patch):
        if common % step == 0:  # a coarse one leaves the squares alone, and pictures are cut more
            yield f"step: {step}", replace(fit, step=step)
    sides = tuple(side for side, group in buckets(fit).items() if all(map(fine, group)))
    if sides:
        yield f"sides: {list(sides)}", replace(fit, sides=sides)
    aspects = {max(size) / min(size) for group in buckets(fit).values() for size in group}
    for aspect in sorted({math.floor(100 * aspect) / 100 for aspect in aspects}, reverse=True):
        yield f"max_aspect: {aspect:g}", replace(fit, max_aspect=aspect)
