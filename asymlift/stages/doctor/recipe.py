"""doctor: what a recipe names, and whether it can be reached from here."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Literal

from asymlift.stages.doctor.check import Check, gib

if TYPE_CHECKING:
    from asymlift.recipe import Recipe

Look = Callable[[], Iterator[Check]]


def looks(recipe: Recipe | None) -> list[tuple[str, Look]]:
    """Without a recipe only the usual backbone of LPIPS is looked for."""
    if recipe is None:
        return [("perceptual weights", lambda: perceptual_weights("vgg", None, "warn"))]
    found: list[tuple[str, Look]] = [
        ("base model", lambda: base_model(recipe)),
        ("training data", lambda: training_data(recipe)),
        ("validation data", lambda: validation_data(recipe)),
        ("run folder", lambda: run_folder(recipe)),
        ("asked for", lambda: asked_for(recipe)),
    ]
    net = recipe.finetune.loss.perceptual
    if net is not None and net.net != "embedded" and net.weights != "random":
        found.append(
            ("perceptual weights", lambda: perceptual_weights(net.net, net.weights, "fail"))
        )
    return found


def perceptual_weights(
    net: str, weights: str | None, without: Literal["warn", "fail"]
) -> Iterator[Check]:
    from asymlift.model.perceptual import backbone_path

    path = backbone_path(net, weights)
    if path.is_file():
        yield Check("perceptual weights", "ok", str(path))
    else:
        yield Check(
            "perceptual weights",
            without,
            f"{path} is not there",
            "for finetune.loss.perceptual",
            "put torchvision's file there or name it in the recipe; the demo brings its own",
        )


def base_model(recipe: Recipe) -> Iterator[Check]:
    from asymlift.artifacts.diffusers_folder import DiffusersFolder
    from asymlift.artifacts.lifted_weights import check_stored_maps
    from asymlift.families.base import check_needs
    from asymlift.stages.locate import base_folder, family_of

    folder = base_folder(recipe)
    family, geometry = family_of(recipe, folder)
    check_stored_maps(DiffusersFolder(folder), family, geometry)
    sizes = f"patch {geometry.pixel_patch}, d {geometry.d}, D {geometry.D}"
    yield Check("base model", "ok", f"{folder}: {family.name}, {sizes}")
    check_needs(family)


def training_data(recipe: Recipe) -> Iterator[Check]:
    if recipe.data.mode == "stream":
        yield Check("training data", "ok", "streamed: it is looked at while training")
        return
    yield named("training data", "data.train", recipe.data.train)


def validation_data(recipe: Recipe) -> Iterator[Check]:
    if recipe.data.validation is not None:
        yield named("validation data", "data.validation", recipe.data.validation)


def named(name: str, key: str, patterns: str | list[str]) -> Check:
    """Whether all that is named is there; nothing is read."""
    from asymlift.data.catalog import expand

    found = expand(patterns)
    sources = [*found.shards, *found.listings]
    gone = [source for source in sources if not source.exists()]
    if gone:
        said = f"{len(gone)} of {len(sources)} are not there: {gone[0]}"
        return Check(name, "fail", said, "", f"check {key}, or run `prepare`")
    return Check(name, "ok", f"{len(sources)} sources, the first is {sources[0]}")


def asked_for(recipe: Recipe) -> Iterator[Check]:
    """What `finetune` refuses to start without."""
    from asymlift.stages.finetune.preview import read_prompts
    from asymlift.stages.finetune.start import check_packages

    check_packages(recipe.finetune)
    if recipe.finetune.preview is not None:
        read_prompts(recipe.finetune.preview.prompts, "finetune.preview.prompts")
    yield Check("asked for", "ok", "packages and prompts of this recipe are there")


def run_folder(recipe: Recipe) -> Iterator[Check]:
    """Where everything is written: it has to exist on every machine, as the same folder."""
    folder = recipe.run_folder
    there = next(path for path in (folder, *folder.parents) if path.exists())
    found = f"{folder}, {gib(shutil.disk_usage(there).free)} free"
    try:
        tempfile.TemporaryFile(dir=there).close()  # what root may not is seen by trying alone
    except OSError as error:
        refused = f"{there} cannot be written to ({error.strerror})"
        remedy = "change its permissions, or choose another `runs` folder"
        yield Check("run folder", "fail", refused, "", remedy)
        return
    yield Check("run folder", "ok", found)
