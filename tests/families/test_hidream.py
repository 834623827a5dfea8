"""What is peculiar to HiDream-I1: pictures that are no squares, and experts."""

import pytest
import torch

from asymlift.errors import BadData, Unavailable
from asymlift.families import FAMILIES
from tests.families.case import case_of
from tests.families.test_lift_identity import lift_error
from tests.model.test_footprint import footprint
from tests.tiny import lifted_pair, tiny_pipeline, tiny_text, tiny_transformer

FAMILY = FAMILIES["hidream"]
WIDE = {"max_resolution": (10, 12)}  # 30 tokens at the most, of which 4 x 6 take 24


def test_a_picture_that_is_no_square_is_filled_up():
    """As in its pipeline, which hands over the map; the empty tokens are lifted too."""
    image, time, text = torch.ones(1, 4, 8, 12), torch.ones(1), tiny_text("hidream", 1)
    larger, usual = (tiny_transformer("hidream", **changes) for changes in (WIDE, {}))
    there, here = (FAMILY.run(net, image, time, text) for net in (larger, usual))
    assert not torch.allclose(there, here)  # it sees them
    assert lift_error(lifted_pair("hidream", net=larger)) <= 1e-12


@pytest.mark.parametrize(("size", "fits"), [((12, 12), True), ((10, 12), True), ((8, 16), False)])
def test_larger_pictures_than_it_knows_are_refused(size, fits):
    net = tiny_transformer("hidream", **WIDE)
    image, time, text = torch.zeros(1, 4, *size), torch.ones(1), tiny_text("hidream", 1)
    if fits:
        assert FAMILY.run(net, image, time, text).shape == image.shape
        return
    with pytest.raises(BadData, match=r"of 4 x 8 tokens, as this model knows 30 tokens of one"):
        FAMILY.run(net, image, time, text)


@pytest.mark.parametrize("forced", [False, True])
@pytest.mark.parametrize("training", [False, True])
def test_experts_let_gradients_through_and_the_answer_is_a_picture(training, forced):
    """Two of four a token. The class itself answers otherwise in training, or cuts the gradient."""
    changes = {"num_routed_experts": 4, "force_inference_output": forced}
    net = tiny_transformer("hidream", **changes).train(training)
    image = torch.randn(2, 4, 6, 6, generator=torch.Generator().manual_seed(0))
    time, text = torch.ones(2), tiny_text("hidream", 2)
    out = FAMILY.run(net, image, time, text)
    out.square().sum().backward()
    assert net.training is training
    for block in net.single_stream_blocks:
        assert all(expert.w1.weight.grad.any() for expert in block.block.ff_i.experts)

    stock = tiny_transformer("hidream", **changes)  # of the same weights, in eval mode
    with torch.no_grad():
        layers = text["encoder_hidden_states_llama3"].transpose(0, 1)
        given = {**text, "encoder_hidden_states_llama3": layers}
        wanted = stock(hidden_states=image, timesteps=time, return_dict=False, **given)[0]
    torch.testing.assert_close(out, wanted, rtol=1e-4, atol=1e-4)


def test_experts_choose_the_same_tokens_in_pixels():
    net = tiny_transformer("hidream", num_routed_experts=4)
    assert lift_error(lifted_pair("hidream", net=net)) <= 1e-12


def test_it_can_be_planned_with_every_expert_taking_every_token():
    """Which token takes which expert follows from numbers, and a plan has none: the most counts."""
    real, fake = (footprint("hidream", real=real) for real in (True, False))
    assert real.student < fake.student < 1.5 * real.student
    assert real.batch == fake.batch


def test_a_folder_without_llama_says_so():
    pipeline = tiny_pipeline("hidream")
    pipeline.text_encoder_4 = None
    with pytest.raises(Unavailable, match="no Llama"):
        FAMILY.encode_prompt(pipeline, ["a bee"], case_of("hidream").length)
