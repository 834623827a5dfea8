"""Shards of every family: a real pipeline folder prepares them, and training can use them."""

import pytest
import torch

from asymlift.artifacts.diffusers_folder import DiffusersFolder
from asymlift.data.catalog import open_catalog
from asymlift.data.pictures import image_to_float
from asymlift.data.reader import Reader
from asymlift.data.records import LATENT, TEXT
from asymlift.families import FAMILIES
from asymlift.model.loading import load_pipeline
from asymlift.recipe import check_recipe
from asymlift.stages.finetune.data import check_sample
from asymlift.stages.open_data import fit_of
from asymlift.stages.verbs import family_of
from tests.families.case import case_of
from tests.stages.prepare.small_prepare import make_folder, run, values_for
from tests.tiny import KINDS, write_pipeline

TOLERANCE = {"float32": 1e-6, "bfloat16": 2**-8, "float8": 2**-4}


@pytest.mark.parametrize(
    ("name", "store"),
    [(name, "float32") for name in FAMILIES]
    + [(name, store) for name in KINDS for store in ("bfloat16", "float8")],
)
@torch.no_grad()
def test_any_family_trains_on_what_its_own_folder_prepared(name, store, tmp_path):
    base = write_pipeline(tmp_path / "model", name)
    make_folder(tmp_path / "source", 6)
    latents = "float16" if store == "bfloat16" else "float32"
    values = values_for(tmp_path, image="png", text=store, latents=latents)
    if case_of(name).grid[0] == case_of(name).grid[1]:  # it draws nothing else
        values["data"]["resize"] = {"sides": [32], "step": 32}
    values["model"] = {"base": str(base), "text_length": 12}
    recipe = check_recipe(values, "recipe")
    assert run(recipe).num_samples == 6

    family, geometry = family_of(recipe, base)
    fit = fit_of(recipe.data.resize, geometry.pixel_patch)
    catalog, reader, pipeline = open_catalog(tmp_path / "out", fit), Reader(), load_pipeline(base)
    assert catalog.has(LATENT).all() and catalog.has(TEXT).all()
    folder = DiffusersFolder(base)
    expected = {"family": name, "vae": folder.fingerprint("vae"), "latents": latents, "text": store}
    reads = folder.text_fingerprint(has_encoder=family.has_text_encoder)
    expected |= {"text encoders": reads, "text length": 12}
    assert expected.items() <= catalog.made.items()
    null_text = family.encode_prompt(pipeline, [""], 12)[0]
    texts = []
    for record in catalog:
        sample = reader.read(record)
        check_sample(
            record, sample, family=family, geometry=geometry, null_text=null_text, text_online=False
        )
        image = image_to_float(sample.image)[None]
        latent = family.encode_latents(pipeline.vae, image)[0]
        torch.testing.assert_close(sample.latent.float(), latent, rtol=2e-3, atol=2e-3)
        wanted = family.encode_prompt(pipeline, [sample.caption], 12)[0]
        assert sample.text.keys() == wanted.keys()
        for part, tensor in wanted.items():
            stored = sample.text[part].to(tensor.dtype)
            scale = tensor.abs().amax(-1, keepdim=True) if tensor.is_floating_point() else 1
            assert ((stored - tensor).abs() <= TOLERANCE[store] * scale + 1e-5).all()
        texts.append(sample.text)
    family.collate([null_text, *texts])
