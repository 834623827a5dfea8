"""Anima: told from Cosmos by its pipeline; its words go through one more network."""

import pytest
import torch

from asymlift.artifacts.diffusers_folder import DiffusersFolder
from asymlift.errors import BadRecipe
from asymlift.families import FAMILIES, find_family
from asymlift.families.refusals import why_refused
from tests.tiny import tiny_pipeline, write_pipeline

ANIMA, COSMOS = FAMILIES["anima"], FAMILIES["cosmos"]
TRANSFORMER = {"_class_name": "CosmosTransformer3DModel"}


def found(name: str, pipeline: str | None) -> str:
    return find_family(name, {"_class_name": pipeline} if pipeline else {}, TRANSFORMER).name


def test_of_two_families_with_one_transformer_the_pipeline_tells_which():
    assert found("auto", "AnimaModularPipeline") == "anima"
    assert found("auto", "Cosmos2TextToImagePipeline") == "cosmos"
    for name in ("anima", "cosmos"):  # as the recipe says, where nothing else does
        assert found(name, "MyPipeline") == found(name, None) == name


@pytest.mark.parametrize("pipeline", ["MyPipeline", None])
def test_what_no_pipeline_tells_has_to_be_said(pipeline):
    with pytest.raises(BadRecipe) as refused:
        found("auto", pipeline)
    assert str(refused.value) == (
        "the checkpoint's transformer, CosmosTransformer3DModel, is of family anima "
        "(AnimaModularPipeline) or cosmos (Cosmos2TextToImagePipeline), and the index names "
        f"neither pipeline but {pipeline}; say which it is, `family: anima`"
    )


@pytest.mark.parametrize(
    ("name", "pipeline", "right"),
    [
        ("anima", "Cosmos2TextToImagePipeline", "cosmos"),
        ("cosmos", "AnimaModularPipeline", "anima"),
    ],
)
def test_the_other_family_is_refused(name, pipeline, right):
    said = f"family is {name}, but the checkpoint is for {pipeline}, which is of family {right}"
    with pytest.raises(BadRecipe, match=said):
        found(name, pipeline)


def test_a_family_of_ones_own_may_be_for_the_same_pipeline():
    assert found("asymlift.families.cosmos:COSMOS", "AnimaModularPipeline") == "cosmos"


def test_what_makes_films_is_refused_for_that():
    """By its pipeline, which neither family has."""
    index = {"_class_name": "Cosmos2VideoToWorldPipeline"}
    family = find_family("auto", index, TRANSFORMER)
    assert "it makes films" in why_refused(family, TRANSFORMER, {}, index)


@torch.no_grad()
def test_a_short_prompt_is_filled_up_only_beside_a_longer_one():
    """The conditioner fills up to 512 words by itself; the model attends to all of them."""
    pipeline = tiny_pipeline("anima")
    samples = ANIMA.encode_prompt(pipeline, ["a bee", "a " * 600], 530)
    assert [len(sample["encoder_hidden_states"]) for sample in samples] == [512, 530]
    assert ANIMA.collate(samples[:1])["encoder_hidden_states"].shape == (1, 512, 24)
    block = pipeline.blocks.sub_blocks["text_encoder"]
    read = block.encode_prompt(
        pipeline, ["a bee", "a " * 600], prepare_unconditional_embeds=False, max_sequence_length=530
    )
    words = pipeline.text_conditioner(
        read["qwen_prompt_embeds"],
        read["t5_input_ids"],
        read["t5_attention_mask"],
        read["qwen_attention_mask"],
    )
    assert words[0, :3].abs().amax(1).min() > 0.1  # it does say something
    torch.testing.assert_close(ANIMA.collate(samples)["encoder_hidden_states"], words)


def test_the_fingerprint_of_its_text_follows_every_part_that_makes_it(tmp_path):
    write_pipeline(tmp_path, "anima")
    fingerprint = DiffusersFolder(tmp_path).text_fingerprint()
    for name in (
        "text_conditioner/diffusion_pytorch_model.safetensors",
        "text_conditioner/config.json",
        "text_encoder/model.safetensors",
        "t5_tokenizer/tokenizer.json",
        "tokenizer/tokenizer.json",
    ):
        path, data = tmp_path / name, (tmp_path / name).read_bytes()
        path.write_bytes(b"3".join(data.rsplit(b"2", 1)))
        assert DiffusersFolder(tmp_path).text_fingerprint() != fingerprint, name
        path.write_bytes(data)
    assert DiffusersFolder(tmp_path).text_fingerprint() == fingerprint
