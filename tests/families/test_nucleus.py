"""What is peculiar to Nucleus-Image: experts that choose their tokens."""

import pytest
import torch

from asymlift.families import FAMILIES
from asymlift.model.checkpointing import checkpoint_blocks
from asymlift.model.footprint import backward
from asymlift.model.like_cuda import LikeCuda
from tests.families.test_lift_identity import lift_error
from tests.model.test_pixel_flow import SIGMA, noisy_tokens
from tests.tiny import lifted_pair, tiny_pipeline, tiny_transformer


def test_experts_that_choose_some_of_the_tokens_choose_the_same_in_pixels():
    """Each takes half of them, where the tiny model of the other tests lets each take all."""
    few = lifted_pair("nucleus", net=tiny_transformer("nucleus", capacity_factors=2.0))
    assert lift_error(few) <= 1e-12


@torch.no_grad()
def test_a_picture_chooses_no_experts_for_another():
    pair = lifted_pair("nucleus", net=tiny_transformer("nucleus", capacity_factors=2.0))
    x_t = noisy_tokens(pair).double()
    both = pair.pixel(x_t, SIGMA, pair.text, pair.grid, floor=1e-6)
    x_t[1] += 3
    other = pair.pixel(x_t, SIGMA, pair.text, pair.grid, floor=1e-6)
    torch.testing.assert_close(both[0], other[0], rtol=1e-12, atol=1e-12)
    assert not torch.allclose(both[1], other[1])


@pytest.mark.parametrize("checkpointing", [False, True])
def test_under_autocast_it_runs_where_norms_answer_in_float32(checkpointing):
    """As they do on a GPU; the class adds what its experts make to what they were fed."""
    pair = lifted_pair("nucleus", dtype=torch.float32, precision=torch.bfloat16)
    net = pair.pixel.net.train()
    if checkpointing:
        checkpoint_blocks(net)
    with LikeCuda("cuda"):
        for _ in range(2):
            u = pair.pixel(noisy_tokens(pair), SIGMA, pair.text, pair.grid, floor=1e-6)
            backward(u.square().mean())
    experts = net.transformer_blocks[1].img_mlp
    assert len(experts._forward_pre_hooks) == 1
    assert experts.experts.down_proj.grad.any()


def test_a_length_that_is_no_multiple_of_eight_is_kept():
    """The pipeline's tokenizer would refuse it."""
    family, pipeline = FAMILIES["nucleus"], tiny_pipeline("nucleus")
    (short,), (longer,) = (family.encode_prompt(pipeline, ["a bee"], n) for n in (12, 16))
    assert (len(short["encoder_hidden_states"]), len(longer["encoder_hidden_states"])) == (12, 16)
    torch.testing.assert_close(short["encoder_hidden_states"], longer["encoder_hidden_states"][:12])
