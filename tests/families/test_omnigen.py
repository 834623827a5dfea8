"""OmniGen: what its class and its collator do, done without their detours."""

import pytest
import torch

from asymlift.families import FAMILIES
from asymlift.families.omnigen import attention_mask, rotation
from asymlift.maths.asymmetric import clean_input, project
from asymlift.maths.patches import image_to_tokens, tokens_to_image
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


@torch.no_grad()
def test_a_picture_that_comes_with_a_prompt_is_read_by_the_second_map():
    """Clean pixels over s are to the lifted map what clean latents are to the base's.

    Through the whole class: the answer is A times the base's, with anything outside the subspace.
    """
    pair, q = lifted_pair("omnigen"), 2
    g = torch.Generator().manual_seed(0)
    z, z_t = (torch.randn(1, n, 16, generator=g, dtype=torch.float64) for n in (6, 24))
    outside = torch.randn(1, 6, len(pair.A), generator=g, dtype=torch.float64)
    x_ref = pair.s * z @ pair.A.T + outside - project(outside, pair.A)

    def answer(flow, drawn, *pictures):
        words, places = 4 + 6, [[2, 8]] * len(pictures)  # among the words
        length = words + 1 + 24
        raw = flow.net(
            hidden_states=tokens_to_image(drawn, q, (4, 6)),
            timestep=torch.tensor([0.3], dtype=torch.float64),
            input_ids=torch.arange(words).unsqueeze(0),
            input_img_latents=[tokens_to_image(one, q, (2, 3)) for one in pictures],
            input_image_sizes={0: places},
            attention_mask=torch.ones(1, length, length, dtype=torch.float64),
            position_ids=torch.arange(length).unsqueeze(0),
            return_dict=False,
        )[0]
        return image_to_tokens(raw, q)

    wanted = answer(pair.latent, z_t, z) @ pair.A.T
    x_t = z_t @ pair.A.T
    close = {"rtol": 0, "atol": 1e-12 * float(wanted.abs().max())}
    torch.testing.assert_close(answer(pair.pixel, x_t, clean_input(x_ref, pair.s)), wanted, **close)
    for wrong in ([x_ref], []):  # not divided by s; not read at all
        far = answer(pair.pixel, x_t, *wrong) - wanted
        assert far.abs().max() > 1e-3 * wanted.abs().max()


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
