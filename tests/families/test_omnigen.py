"""OmniGen: what its class and its collator do, done without their detours."""

import pytest
import torch

from asymlift.families import FAMILIES
from asymlift.families.omnigen import attention_mask, rotation
from asymlift.maths.patches import tokens_to_image
from tests.tiny import lifted_pair, tiny_pipeline, tiny_text, tiny_transformer

OMNIGEN = FAMILIES["omnigen"]


def test_the_mask_is_that_of_the_pipelines_collator():
    lengths, num = [3, 7, 5], 24
    made = tiny_pipeline("omnigen").multimodal_processor.collator
    ids = [list(range(length)) for length in lengths]
    _, marks, _ = made.pad_input_ids(ids, {})
    theirs, _ = made.create_mask(marks, [num] * 3)
    assert torch.equal(attention_mask(marks.bool(), num).float(), theirs)


@pytest.mark.parametrize("length", [30, 300])
@pytest.mark.parametrize("most", [64, 131072])
def test_positions_turn_as_the_class_turns_them(length, most):
    """On both sides of where the long factors begin, and with a scale or without."""
    net = tiny_transformer(
        "omnigen", original_max_position_embeddings=64, max_position_embeddings=most
    )
    ids = torch.arange(length).unsqueeze(0)
    for ours, theirs in zip(
        rotation(net.rope, torch.zeros(1), ids), net.rope(torch.zeros(1), ids), strict=True
    ):
        torch.testing.assert_close(ours, theirs)


def test_a_prompt_is_alone_in_a_batch():
    """Padding is to the left and unseen; the class knows only the first sample's positions."""
    net, time = tiny_transformer("omnigen"), torch.tensor([0.3, 0.8])
    latent = torch.randn(2, 4, 8, 12)
    short, long = ({"input_ids": torch.arange(n) + 5} for n in (4, 11))
    together = OMNIGEN.run(net, latent, time, OMNIGEN.collate([short, long]))
    for i, sample in enumerate([short, long]):
        alone = OMNIGEN.run(net, latent[i : i + 1], time[i : i + 1], OMNIGEN.collate([sample]))
        torch.testing.assert_close(together[i : i + 1], alone, rtol=1e-4, atol=1e-4)


def test_both_maps_that_read_pictures_are_lifted():
    pair = lifted_pair("omnigen")
    for path in OMNIGEN.first_maps:
        assert pair.pixel.net.get_submodule(path).weight.shape[1] == 3 * 8**2
    first, second = (pair.pixel.net.get_submodule(path).weight for path in OMNIGEN.first_maps)
    assert not torch.allclose(first, second)


def test_a_picture_that_comes_with_a_prompt_is_read_by_the_second_map():
    """Clean pixels over s are to the lifted map what clean latents are to the base's."""
    pair, grid, q = lifted_pair("omnigen"), (4, 6), 2
    z = torch.randn(1, 24, pair.geometry.d, dtype=torch.float64)
    latent = tokens_to_image(z, q, grid)
    x_ref = pair.s * z @ pair.A.T
    pixels = tokens_to_image(x_ref / pair.s, q, grid)
    read = [
        flow.net.patch_embedding([image], is_input_image=True)[0]
        for flow, image in ((pair.latent, latent), (pair.pixel, pixels))
    ]
    torch.testing.assert_close(*read)


def test_a_prompt_stands_inside_the_pipelines_instruction():
    pipeline = tiny_pipeline("omnigen")
    bee, none = OMNIGEN.encode_prompt(pipeline, ["a bee", ""], None)
    said = pipeline.tokenizer.decode(bee["input_ids"])
    assert "Generate an image according to the following instructions\na bee<|end|>" in said
    assert len(bee["input_ids"]) == len(none["input_ids"]) + len("a bee")


def test_tokens_of_any_kind_of_number_are_tokens():
    """`plan` makes empty embeddings of one kind for all families."""
    net, text = tiny_transformer("omnigen"), tiny_text("omnigen", 1)
    latent, time = torch.randn(1, 4, 8, 12), torch.tensor([0.3])
    plain = OMNIGEN.run(net, latent, time, text)
    other = OMNIGEN.run(net, latent, time, text | {"input_ids": text["input_ids"].float()})
    assert torch.equal(plain, other)
