"""A model whose configs are not what they should be is refused by the name of its folder."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from asymlift.artifacts.diffusers_folder import DiffusersFolder
from asymlift.embedded import MODELS
from asymlift.errors import BadData, BadRecipe
from asymlift.families import family_of_lifted, find_family
from asymlift.families.base import Geometry
from asymlift.families.flux2 import FLUX2
from asymlift.recipe import check_recipe
from asymlift.stages.doctor.recipe import base_model
from asymlift.stages.inspection.model import inspect_path
from asymlift.stages.locate import base_shift_of, geometry_of
from tests.stages.small_run import recipe_values

NO_SIZES = "do not give the sizes of a flux2 (TypeError: "


def geometry(base: Path) -> Geometry:
    folder = DiffusersFolder(base)
    family = find_family("auto", folder.model_index, folder.config("transformer"))
    return geometry_of(folder, family)


@pytest.mark.parametrize(
    "transformer, vae, said",
    [
        ({"in_channels": "12"}, {}, NO_SIZES),
        ({"in_channels": None}, {}, NO_SIZES),
        ({}, {"latent_channels": "x"}, NO_SIZES),
        ({}, {"latent_channels": {}}, NO_SIZES),
        ({}, {"block_out_channels": 5}, NO_SIZES),
        ({}, {"patch_size": 7}, NO_SIZES),
        ({}, {"patch_size": [4, 4]}, "flux2: the VAE's patch_size is [4, 4]"),
        ({}, {"latent_channels": 2**60}, "a latent token has"),
        ({"in_channels": 4.0}, {"latent_channels": 1.0}, "give no channels that is a whole"),
        ({"in_channels": -4}, {"latent_channels": -1}, "no channels that is a whole number from"),
        ({}, {"block_out_channels": [8] * 10**5}, "give no vae_factor that is a whole number"),
    ],
)
def test_sizes_that_are_none_are_refused_by_folder(transformer, vae, said, tmp_path):
    base = Path(shutil.copytree(MODELS["tiny"], tmp_path / "base"))
    assert geometry(base) == geometry(MODELS["tiny"])
    for part, change in (("transformer", transformer), ("vae", vae)):
        path = base / part / "config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | change))
    with pytest.raises(BadData) as refused:
        geometry(base)
    assert str(refused.value).startswith(f"{base}: ") and said in str(refused.value)


@pytest.mark.parametrize(
    "change, said",
    [
        ({"shift": "x", "use_dynamic_shifting": False}, "does not give a time shift (ValueError: "),
        ({"shift": [], "use_dynamic_shifting": False}, "does not give a time shift (TypeError: "),
        ({"shift": -1.0, "use_dynamic_shifting": False}, "gives a time shift of -1.0"),
        ({"shift": float("nan"), "use_dynamic_shifting": False}, "gives a time shift of nan"),
    ],
)
def test_a_time_shift_that_is_none_is_refused_by_file(change, said, tmp_path):
    base = Path(shutil.copytree(MODELS["tiny"], tmp_path / "base"))
    assert base_shift_of(DiffusersFolder(base), FLUX2, 16) > 0
    path = base / "scheduler" / "scheduler_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    with pytest.raises(BadData) as refused:
        base_shift_of(DiffusersFolder(base), FLUX2, 16)
    assert str(refused.value).startswith(f"{path}: ") and said in str(refused.value)


def test_a_vae_of_another_class_than_the_index_has_is_refused(tmp_path):
    """Although its sizes agree."""
    base = Path(shutil.copytree(MODELS["tiny"], tmp_path / "base"))
    path = base / "vae" / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"_class_name": "AutoencoderKL"}))
    said = "vae/ is a AutoencoderKL, but model_index.json has a AutoencoderKLFlux2 there"
    with pytest.raises(BadData, match=said):
        geometry(base)


@pytest.mark.parametrize("named", ["auto", "flux2"])
def test_a_lifted_model_is_of_the_family_that_it_states(named):
    assert family_of_lifted("flux2", named) is FLUX2


@pytest.mark.parametrize(
    ("named", "said"),
    [
        ("sd3", "model.family is sd3, but the model was lifted as flux2; use `family: auto`"),
        ("fluks2", r"no family 'fluks2' \(did you mean flux2\?\); known are anima, auraflow"),
    ],
)
def test_another_family_than_a_model_was_lifted_as_is_refused(named, said):
    with pytest.raises(BadRecipe, match=said):
        family_of_lifted("flux2", named)


def test_maps_that_are_quantised_are_refused_before_anything_is_written(tmp_path):
    base = Path(shutil.copytree(MODELS["tiny"], tmp_path / "base"))
    (path,) = (base / "transformer").glob("*.safetensors")
    weights = load_file(path)
    weights["x_embedder.weight"] = weights["x_embedder.weight"].to(torch.float8_e4m3fn)
    save_file(weights, path, {"format": "pt"})
    found = inspect_path(base)
    assert found.facts["can_be_ported"] is False
    assert any("x_embedder.weight is stored as F8_E4M3" in problem for problem in found.problems)
    recipe = check_recipe(recipe_values(tmp_path) | {"model": {"base": str(base)}}, "recipe")
    with pytest.raises(BadData, match="dequantized, and save_pretrained it"):
        list(base_model(recipe))
