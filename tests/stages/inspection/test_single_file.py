"""One file of weights is recognised by its tensors, in diffusers' names or in its authors' own."""

import pytest
import torch
from safetensors.torch import save_file

from asymlift.artifacts.safetensors_stream import TensorInfo
from asymlift.families import FAMILIES
from asymlift.stages.inspection.model import inspect_path
from asymlift.stages.inspection.single_file import ORIGINAL, portability_of
from tests.tiny import tiny_transformer, write_pipeline

# As the files of their authors have them; shapes where diffusers looks at them.
AUTHORS = {
    "flux1": {
        "double_blocks.0.img_attn.norm.key_norm.scale": (128,),
        "img_in.weight": (3072, 64),
        "guidance_in.in_layer.bias": (3072,),
    },
    "flux2": {"single_stream_modulation.lin.weight": (18432, 6144)},
    "sd3": {
        "model.diffusion_model.joint_blocks.0.context_block.adaLN_modulation.1.bias": (9216,),
        "model.diffusion_model.pos_embed": (1, 36864, 1536),
    },
    "zimage": {"model.diffusion_model.layers.0.adaLN_modulation.0.weight": (15360, 256)},
}


def as_stored(shapes: dict[str, tuple[int, ...]]) -> dict[str, TensorInfo]:
    return {name: TensorInfo("BF16", shape) for name, shape in shapes.items()}


@pytest.mark.parametrize("name", FAMILIES)
def test_weights_in_diffusers_names_are_recognised(name):
    shapes = {key: tuple(t.shape) for key, t in tiny_transformer(name).state_dict().items()}
    rows, can_be_ported = portability_of(as_stored(shapes))
    said = dict(rows)
    assert can_be_ported and name in said["family"].partition(" (")[0].split(" or ")
    assert "put it, with its config.json, into transformer/ beside" in said["can be ported"]
    alone, _ = portability_of(as_stored(shapes), FAMILIES[name].transformer)
    shared = {family.name for family in FAMILIES.values()
              if family.transformer == FAMILIES[name].transformer}  # fmt: skip
    assert {*dict(alone)["family"].partition(" (")[0].split(" or ")} == shared


@pytest.mark.parametrize("name", AUTHORS)
def test_weights_in_their_authors_own_names_are_recognised(name):
    rows, can_be_ported = portability_of(as_stored(AUTHORS[name]))
    said = dict(rows)
    assert can_be_ported and said["family"].startswith(f"{name} (its authors' own format")
    assert f"{FAMILIES[name].transformer}.from_single_file(FILE, config=" in said["can be ported"]


def test_a_transformer_that_two_pipelines_share_is_either_and_says_whose_parts_it_needs():
    shapes = {key: tuple(t.shape) for key, t in tiny_transformer("cosmos").state_dict().items()}
    said = dict(portability_of(as_stored(shapes))[0])
    assert said["family"] == "anima or cosmos (tensors named as in diffusers)"
    homes = "circlestone-labs/Anima-Base-v1.0-Diffusers or nvidia/Cosmos-Predict2-2B-Text2Image"
    assert said["can be ported"].endswith(f"beside the other parts of {homes}")


@pytest.mark.parametrize("prefix", ["net.", "model.diffusion_model.", ""])
def test_animas_own_files_are_not_taken_for_cosmos(prefix):
    """They hold the text conditioner besides."""
    shapes = {
        "x_embedder.proj.1.weight": (2048, 68),
        "blocks.0.self_attn.q_proj.weight": (2048, 2048),
        "pos_embedder.dim_spatial_range": (22,),
    }
    cosmos, _ = portability_of(as_stored({f"net.{name}": s for name, s in shapes.items()}))
    assert dict(cosmos)["family"].startswith("cosmos (")
    shapes |= {"llm_adapter.embed.weight": (32128, 1024)}
    rows, can_be_ported = portability_of(as_stored({prefix + n: s for n, s in shapes.items()}))
    said = dict(rows)
    assert can_be_ported and said["family"] == "anima (its authors' own format)"
    assert said["can be ported"].startswith(
        "yes, from a whole pipeline folder: circlestone-labs/Anima-Base-v1.0-Diffusers is one"
    )


def test_a_model_that_cannot_be_ported_is_named_and_refused():
    stable_diffusion = {"model.diffusion_model.input_blocks.0.0.weight": (320, 4, 3, 3)}
    rows, can_be_ported = portability_of(as_stored(stable_diffusion))
    assert not can_be_ported
    assert rows[0] == ("format", "v1") and rows[1][1].startswith("no: no family for v1")


def test_other_tensors_are_nobodys(tmp_path):
    path = tmp_path / "some.safetensors"
    save_file({"a": torch.zeros(2)}, path)
    found = inspect_path(path)
    assert found.facts["can_be_ported"] is False
    assert "family" not in dict(found.rows)


def test_every_format_that_we_name_is_one_that_diffusers_can_tell():
    from diffusers.loaders import single_file_utils

    assert ORIGINAL.keys() <= single_file_utils.DIFFUSERS_DEFAULT_PIPELINE_PATHS.keys()


def test_every_class_that_is_to_load_such_a_file_can():
    from diffusers.loaders.single_file_model import SINGLE_FILE_LOADABLE_CLASSES

    assert {FAMILIES[name].transformer for name in ORIGINAL.values()} <= {
        *SINGLE_FILE_LOADABLE_CLASSES
    }


def test_a_file_of_a_whole_pipeline_is_of_the_class_beside_it_and_part_of_that(tmp_path):
    folder = write_pipeline(tmp_path / "model", "longcat")
    (path,) = (folder / "transformer").glob("*.safetensors")
    said = dict(inspect_path(path).rows)
    assert said["family"] == "longcat (tensors named as in diffusers)"
    assert said["part of"] == f"the model in {folder}: give that folder"
    assert inspect_path(folder / "model_index.json") == inspect_path(folder)
