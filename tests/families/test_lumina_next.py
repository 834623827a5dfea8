"""What is peculiar to Lumina-Next: a variance, positions, a class that cannot checkpoint."""

import copy

import pytest
import torch

from asymlift.families import FAMILIES
from asymlift.families.lumina_next import turns
from asymlift.model.checkpointing import checkpoint_blocks
from asymlift.runtime import third_party
from tests.families.case import Case, case_of
from tests.tiny import lifted_pair, tiny_pipeline, tiny_text, tiny_transformer

FAMILY = FAMILIES["lumina_next"]
CASE: Case = case_of("lumina_next")


def test_the_lifted_model_has_no_variance():
    pair = lifted_pair("lumina_next")
    channels = [net.out_channels for net in (pair.latent.net, pair.pixel.net)]
    assert channels == [2 * CASE.sizes.channels, CASE.sizes.pixel_channels]


@pytest.mark.parametrize(("h", "w"), [(4, 6), (9, 2)])
def test_turns_are_those_of_the_class(h, w):
    """The pipeline makes 384 x 384 of them, for every call."""
    third_party.library("diffusers")
    from diffusers.models.embeddings import get_2d_rotary_pos_embed_lumina

    table = get_2d_rotary_pos_embed_lumina(16, 384, 384, linear_factor=0.7, ntk_factor=1.0)
    torch.testing.assert_close(turns(16, h, w, 0.7, torch.device("cpu")), table[:h, :w])


def test_its_blocks_are_run_again_all_the_same():
    net, text = tiny_transformer("lumina_next"), tiny_text("lumina_next", 1)
    with pytest.raises(ValueError, match="does not support gradient checkpointing"):
        net.enable_gradient_checkpointing()
    checkpoint_blocks(net)
    net, runs = copy.deepcopy(net), []
    net.layers[0].feed_forward.register_forward_hook(lambda *_: runs.append(1))
    out = FAMILY.run(net, torch.ones(1, 4, 4, 6), torch.ones(1), text)
    assert len(runs) == 1
    out.sum().backward()
    assert len(runs) == 2 and net.layers[0].gate.grad.any()


@torch.no_grad()
def test_words_of_another_dtype_than_its_norm_are_cast():
    """As a trunk in bf16 gets them under autocast; on a CPU the norm would refuse."""
    net, text = tiny_transformer("lumina_next").bfloat16(), tiny_text("lumina_next", 1)
    with torch.autocast("cpu", torch.bfloat16):
        out = FAMILY.run(net, torch.ones(1, 4, 4, 6), torch.ones(1), text)
    assert out.isfinite().all()


def test_a_length_that_is_no_multiple_of_eight_is_kept():
    """The pipeline's tokenizer would refuse it; its own length is as before."""
    pipeline = tiny_pipeline("lumina_next")
    (short,), (longer,) = (FAMILY.encode_prompt(pipeline, ["bees " * 5], n) for n in (12, 300))
    assert [len(one["encoder_hidden_states"]) for one in (short, longer)] == [12, 25]
    torch.testing.assert_close(short["encoder_hidden_states"], longer["encoder_hidden_states"][:12])
    assert pipeline.max_sequence_length == 256
