"""Every recipe in recipes/ is one, and says in its first lines what it is."""

from pathlib import Path

import pytest

from asymlift.families import FAMILIES
from asymlift.families.base import matching_modules
from asymlift.model.trainable import path_of
from asymlift.recipe import load_recipe
from asymlift.stages.demo import recipe_file
from asymlift.stages.locate import base_folder, family_of
from asymlift.stages.open_data import fit_of
from asymlift.stages.sizes import Sizes
from tests.families.case import case_of, published_net

RECIPES = sorted((Path(__file__).parents[1] / "recipes").glob("*.yaml"))
PORTS = [path for path in RECIPES if "embedded:" not in path.read_text()]


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_a_recipe_parses_and_begins_with_what_it_is(path):
    recipe = load_recipe(path)

    assert path.read_text().startswith("# ")
    assert recipe.finetune.batch % recipe.finetune.micro_batch == 0
    if recipe.model.base.startswith("embedded:"):
        family, geometry = family_of(recipe, base_folder(recipe))
        assert family is FAMILIES["flux2"]
        assert recipe.sample.height % geometry.pixel_patch == 0


@pytest.mark.parametrize("path", PORTS, ids=lambda path: path.stem)
def test_a_recipe_fits_the_checkpoint_that_it_names(path):
    """Its class, built at full size without weights, has what the recipe trains."""
    recipe = load_recipe(path)
    family = FAMILIES[recipe.model.family]
    (base,) = (
        known
        for known in case_of(family.name).published
        if known.name.endswith(f"/{Path(recipe.model.base).name}")
    )
    assert base.name in family.checkpoints and f"hf download {base.name} " in path.read_text()
    net = published_net(family.transformer, base)
    sizes = family.geometry(dict(net.config), base.vae)

    assert recipe.finetune.train != "full"
    targets = recipe.finetune.train.lora.targets
    assert matching_modules(net, family.lora_targets if targets == "family" else targets)
    for role in recipe.finetune.train.modules:
        assert path_of(role, family, net)
    assert recipe.sample.height % sizes.pixel_patch == recipe.sample.width % sizes.pixel_patch == 0
    assert all(side % sizes.pixel_patch == 0 for side in recipe.data.resize.sides)
    drawn = Sizes(family, sizes, net.config, path)
    drawn.check_resize(fit_of(recipe.data.resize, sizes.pixel_patch))
    drawn.check_drawn(recipe.sample.height, recipe.sample.width)


def test_the_published_constants_are_the_defaults():
    """The big recipe writes out what the sections say when they are left out."""
    written = load_recipe(recipe_file("flux2-klein.yaml")).finetune
    eight_bit = "finetune.optimizer={kind: adamw_8bit}"  # an extra, so it cannot be the default
    bare = load_recipe(
        recipe_file("flux2-klein.yaml"),
        [eight_bit, *(f"finetune.{key}={{}}" for key in ("time", "ema", "clip", "schedule"))],
    ).finetune

    for section in ("time", "optimizer", "ema", "clip", "schedule"):
        assert getattr(written, section) == getattr(bare, section)


def test_the_demo_finds_its_recipe():
    assert recipe_file("tiny.yaml").name == "tiny.yaml"
