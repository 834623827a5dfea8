"""What is peculiar to Ideogram 4: levels of its own, prompts that are refused, padding anywhere."""

import importlib

import pytest
import torch

from asymlift.families import FAMILIES
from asymlift.runtime import third_party
from tests.tiny import tiny_pipeline, tiny_text, tiny_transformer

FAMILY = FAMILIES["ideogram4"]


@pytest.mark.parametrize("size", [(256, 512), (1024, 1024), (2048, 1536)])
def test_larger_pictures_are_shifted_as_the_pipeline_does(size):
    """Against its levels for 512 x 512 pixels, which its logit-normal spaces and no shift does."""
    pipeline = third_party.library("diffusers").Ideogram4Pipeline
    module = importlib.import_module(pipeline.__module__)
    own, usual = (
        module._logit_normal_sigmas(20, module._resolution_aware_mu(*pixels, 0.0), std=1.5)
        for pixels in (size, (512, 512))
    )
    shift = FAMILY.base_shift({"shift": 1.0}, size[0] * size[1] // 16**2)
    torch.testing.assert_close(own[1:], (shift * usual / (1 + (shift - 1) * usual))[1:])


@torch.no_grad()
def test_padding_may_lie_on_either_side_of_the_words():
    """The pipeline pads before them, our batches behind."""
    net, text = tiny_transformer("ideogram4"), tiny_text("ideogram4", 1)
    words, mask = text["encoder_hidden_states"], text["encoder_attention_mask"]
    gap, nothing = torch.ones_like(words[:, :3]), torch.zeros_like(mask[:, :3])
    image, time = torch.ones(1, 4, 4, 6), torch.full((1,), 0.3)
    plain = FAMILY.run(net, image, time, text)
    for order in (slice(None), slice(None, None, -1)):
        padded = {
            "encoder_hidden_states": torch.cat([gap, words][order], 1),
            "encoder_attention_mask": torch.cat([nothing, mask][order], 1),
        }
        torch.testing.assert_close(FAMILY.run(net, image, time, padded), plain)


def test_a_long_prompt_is_cut_where_the_pipeline_refuses_it():
    pipeline = tiny_pipeline("ideogram4")
    with pytest.raises(ValueError, match="exceeds max_sequence_length"):
        pipeline.encode_prompt("a" * 50, 4, 6, 12, "cpu")
    (short,), (whole,) = (FAMILY.encode_prompt(pipeline, ["a" * 50], n) for n in (12, None))
    assert len(short["encoder_hidden_states"]) == 12
    first = whole["encoder_hidden_states"][:12]
    torch.testing.assert_close(short["encoder_hidden_states"], first)
