"""What is peculiar to PRX: two VAEs, sizes that it is told, how its files are written, and ftfy."""

import json
import shutil
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from asymlift.artifacts.diffusers_folder import DiffusersFolder
from asymlift.errors import BadData, Unavailable
from asymlift.families import FAMILIES
from asymlift.families.base import Geometry
from asymlift.model.loading import (
    load_pipeline,
    load_pipeline_parts,
    load_transformer,
)
from asymlift.recipe import check_recipe
from asymlift.stages.convert import convert
from asymlift.stages.doctor.recipe import base_model
from asymlift.stages.doctor.table import guarded
from asymlift.stages.locate import family_in
from asymlift.stages.self_check import COUPLING_TOLERANCE
from tests.families.case import CHANNELS, WORDS, Case, case_of, diffusers_part, published_net
from tests.families.cases import prx, sana
from tests.families.test_lift_identity import lift_error
from tests.families.test_pipelines import disagreements, sampling_error
from tests.stages.small_run import recipe_values
from tests.stages.test_convert import real_plan
from tests.tiny import lifted_pair, tiny_pipeline, tiny_text, tiny_transformer, write_pipeline

FAMILY = FAMILIES["prx"]
LEVELS = 6
DC = {  # as published, but narrow
    "latent_channels": CHANNELS,
    "encoder_block_out_channels": (8,) * LEVELS,
    "decoder_block_out_channels": (8,) * LEVELS,
    "encoder_layers_per_block": (1,) * LEVELS,
    "decoder_layers_per_block": (1,) * LEVELS,
    "encoder_qkv_multiscales": ((),) * LEVELS,
    "decoder_qkv_multiscales": ((),) * LEVELS,
    "scaling_factor": 0.41407,
}
DC_TRANSFORMER = {"in_channels": 32, "patch_size": 1}  # of diffusers' conversion script
VARIANTS = {
    "a VAE 32 times down": replace(
        prx.CASE,
        transformer={**prx.CASE.transformer, "patch_size": 1},
        vae=diffusers_part("AutoencoderDC", **DC),
        sizes=Geometry(vae_factor=32, channels=CHANNELS, patch=1),
        raw_latent=lambda vae, image: vae.encode(image).latent,
    ),
    "told the size": replace(
        prx.CASE, transformer={**prx.CASE.transformer, "resolution_embeds": True}
    ),
}


@pytest.fixture(params=VARIANTS)
def variant(request, monkeypatch) -> Iterator[Case]:
    """The case of a checkpoint of another kind stands for the family's."""
    monkeypatch.setattr(prx, "CASE", VARIANTS[request.param])
    case_of.cache_clear()
    yield VARIANTS[request.param]
    case_of.cache_clear()


# -- other kinds of checkpoint


def test_a_checkpoint_of_another_kind_is_lifted_exactly(variant):
    pair = lifted_pair("prx")
    assert pair.geometry == variant.sizes
    assert lift_error(pair) <= 1e-12


def test_its_pipeline_agrees(variant):
    errors = disagreements("prx", FAMILY)
    assert max(errors.values()) < 2e-5, errors


def test_its_pipeline_samples_the_lifted_model(variant):
    assert sampling_error("prx", 3) < 2e-3


def test_the_published_dc_ae_has_the_sizes_of_sanas():
    """Cells of 32 pixels, of 32 channels, a token each."""
    name = "Photoroom/prx-512-t2i-dc-ae"
    assert name in FAMILY.checkpoints
    net = published_net(
        FAMILY.transformer, replace(prx.CASE.published[0], transformer=DC_TRANSFORMER)
    )
    sizes = FAMILY.geometry(dict(net.config), sana.CASE.published[0].vae)
    assert (sizes, sizes.d, sizes.D) == (Geometry(32, 32, 1), 32, 3072)
    assert net.img_in.weight.shape == (1792, 32)


def test_the_size_of_the_map_that_it_is_told_matters():
    """So the pixel model has to be told the same."""
    net = tiny_transformer("prx", resolution_embeds=True)
    image, time, text = torch.ones(1, 4, 8, 12), torch.ones(1), tiny_text("prx", 1)
    with torch.no_grad():
        told = FAMILY.run(net, image, time, text)
        net.resolution_embedder = None
        untold = FAMILY.run(net, image, time, text)
    assert not torch.allclose(told, untold, rtol=0.1)


def test_a_bottleneck_before_the_first_map_is_refused():
    config = {**prx.CASE.transformer, "bottleneck_size": 768}
    with pytest.raises(BadData, match=r"^prx: bottleneck_size is 768, so that two maps in a row"):
        FAMILY.geometry(config, dict(prx.CASE.vae().config))


def test_prx_pixel_is_refused_for_what_it_is(tmp_path):
    """Of the same class, but it draws pixels already: that is said before its sizes are read."""
    index = {
        "_class_name": "PRXPixelPipeline",
        "transformer": ["diffusers", FAMILY.transformer],
        "scheduler": ["diffusers", "FlowMatchEulerDiscreteScheduler"],
    }
    (tmp_path / "transformer").mkdir()
    (tmp_path / "model_index.json").write_text(json.dumps(index))
    config = {"_class_name": FAMILY.transformer, "in_channels": 3, "bottleneck_size": 768}
    (tmp_path / "transformer" / "config.json").write_text(json.dumps(config))
    with pytest.raises(BadData, match=r"made for PRXPixelPipeline, .*: it makes pixels already"):
        family_in(DiffusersFolder(tmp_path), "auto")


# -- its files


def rewrite(path: Path, change: dict[str, Any], *gone: str) -> None:
    config = {k: v for k, v in json.loads(path.read_text()).items() if k not in gone}
    path.write_text(json.dumps(config | change))


def as_published(folder: Path) -> None:
    """As diffusers' conversion script wrote it, with the transformers of that time."""
    rewrite(
        folder / "model_index.json",
        {
            "text_encoder": ["prx", "T5GemmaEncoder"],
            "tokenizer": ["transformers", "GemmaTokenizerFast"],
        },
    )
    written = folder / "text_encoder" / "config.json"
    new = json.loads(written.read_text())
    old = {"rope_theta": new["rope_parameters"]["rope_theta"], "torch_dtype": new["dtype"]}
    rewrite(written, old, "rope_parameters", "dtype")
    rewrite(folder / "transformer" / "config.json", {}, "_class_name", "_diffusers_version")


def with_the_config_of_the_whole(folder: Path) -> None:
    """As T5Gemma's own authors have it, encoder and decoder, which diffusers reads too."""
    configs = tiny_pipeline("prx").text_encoder.config.to_dict()
    whole = {"model_type": "t5gemma", "encoder": configs, "decoder": configs}
    (folder / "text_encoder" / "config.json").write_text(json.dumps(whole))


def as_saved_by_diffusers(folder: Path) -> None:
    """As a pipeline saves it that diffusers has loaded, with a class of its own."""
    rewrite(folder / "model_index.json", {"text_encoder": ["diffusers", "T5GemmaEncoder"]})


WRITTEN = {
    "as published": as_published,
    "as a pipeline saves it": lambda folder: None,
    "as diffusers saves what it has loaded": as_saved_by_diffusers,
    "with the config of the whole": with_the_config_of_the_whole,
}


@pytest.mark.parametrize("how", WRITTEN)
def test_its_folder_is_read_however_it_was_written(how, tmp_path):
    saved, folder = tiny_pipeline("prx"), write_pipeline(tmp_path, "prx")
    WRITTEN[how](folder)

    pipeline = load_pipeline(folder)
    net = load_transformer(folder, family_in(DiffusersFolder(folder), "auto"))

    assert type(pipeline.text_encoder.config).__name__ == "T5GemmaModuleConfig"
    for key, tensor in saved.text_encoder.state_dict().items():
        assert torch.equal(pipeline.text_encoder.state_dict()[key], tensor)
    pair = (FAMILY.encode_prompt(one, ["a bee", ""], 12) for one in (saved, pipeline))
    for mine, theirs in zip(*pair, strict=True):
        torch.testing.assert_close(mine["encoder_hidden_states"], theirs["encoder_hidden_states"])
    for key, tensor in saved.transformer.state_dict().items():
        assert torch.equal(net.state_dict()[key], tensor)


@pytest.mark.parametrize("how", WRITTEN)
@pytest.mark.parametrize("asked", [None, torch.bfloat16, torch.float32])
def test_its_text_encoder_has_the_dtype_asked_for_or_stored(asked, how, tmp_path):
    folder = write_pipeline(tmp_path, "prx")
    tiny_pipeline("prx").text_encoder.bfloat16().save_pretrained(folder / "text_encoder")
    WRITTEN[how](folder)
    part = load_pipeline_parts(folder, ["text_encoder"], dtype=asked)["text_encoder"]
    assert part.dtype == (asked or torch.bfloat16)


def test_a_transformers_that_reads_its_config_by_itself_may(tmp_path, monkeypatch):
    encoder = tiny_pipeline("prx").text_encoder
    monkeypatch.setattr(type(encoder), "config_class", type(encoder.config))
    part = load_pipeline_parts(write_pipeline(tmp_path, "prx"), ["text_encoder"])["text_encoder"]
    assert part.config.to_dict().items() >= {"hidden_size": WORDS, "num_hidden_layers": 2}.items()


def test_nothing_else_is_taken_from_where_its_text_encoder_is(tmp_path):
    folder = write_pipeline(tmp_path, "prx")
    for library, kind in [
        ("prx", "PRXPipeline"),
        ("prx.T5GemmaEncoder", ""),
        ("x", "T5GemmaEncoder"),
    ]:
        rewrite(folder / "model_index.json", {"text_encoder": [library, kind]})
        with pytest.raises(BadData, match=f"text_encoder needs code from '{library}'; only"):
            load_pipeline_parts(folder, ["text_encoder"])


def test_a_published_folder_is_converted(tmp_path):
    """Its transformer's config does not say of which class it is, but model_index.json does."""
    base = write_pipeline(tmp_path / "base", "prx")
    as_published(base)
    plan = real_plan(tmp_path, "prx", base)
    assert convert(plan).coupling.error <= COUPLING_TOLERANCE / 10
    assert load_transformer(plan.output, FAMILY).config.in_channels == 48

    rewrite(base / "model_index.json", {"transformer": ["diffusers", "SD3Transformer2DModel"]})
    with pytest.raises(BadData, match="its transformer is a SD3Transformer2DModel, but family prx"):
        convert(replace(plan, output=tmp_path / "other"))


def test_a_text_encoder_without_some_of_its_weights_is_refused(tmp_path):
    folder = write_pipeline(tmp_path, "prx")
    as_published(folder)
    (path,) = (folder / "text_encoder").glob("*.safetensors")
    weights = load_file(path)
    weights.pop("norm.weight")
    save_file(weights, path, metadata={"format": "pt"})
    with pytest.raises(BadData, match=r"text_encoder: weights are missing: norm\.weight"):
        load_pipeline_parts(folder, ["text_encoder"])


def test_a_text_encoder_that_cannot_be_built_is_named(tmp_path):
    folder = write_pipeline(tmp_path, "prx")
    rewrite(folder / "text_encoder" / "config.json", {"hidden_size": "x"})
    with pytest.raises(BadData, match=r"text_encoder: cannot be loaded as T5GemmaEncoder: .*size"):
        load_pipeline_parts(folder, ["text_encoder"])


# -- what its prompts need


@pytest.fixture
def without_ftfy(monkeypatch) -> None:
    monkeypatch.setitem(sys.modules, "ftfy", None)


def test_prompts_without_ftfy_say_how_to_get_it(without_ftfy, tmp_path):
    """Before an encoder is read; the VAE alone can be had."""
    folder = write_pipeline(tmp_path / "model", "prx")
    load_pipeline(folder, {"vae"}, family=FAMILY)
    shutil.rmtree(folder / "text_encoder")
    with pytest.raises(Unavailable) as refused:
        load_pipeline(folder, family=FAMILY)
    assert refused.value.exit == 69
    said = str(refused.value)
    assert said.startswith("prx: no prompt can be embedded without ftfy, which cannot be imported")
    assert said.endswith("pip install 'asymlift[prompts]'")


def test_doctor_misses_ftfy_where_a_recipe_is_for_prx(tmp_path, without_ftfy):
    base = write_pipeline(tmp_path / "model", "prx")
    recipe = check_recipe(recipe_values(tmp_path) | {"model": {"base": str(base)}}, "recipe")
    found, missing = guarded("base model", lambda: base_model(recipe))
    assert (found.status, missing.status) == ("ok", "fail")
    assert missing.found.endswith("pip install 'asymlift[prompts]'")
