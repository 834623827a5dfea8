"""What is peculiar to Lumina-Image 2.0: tables of positions, and no prompt at all."""

import pytest
import torch

from asymlift.errors import BadData
from asymlift.families import FAMILIES
from tests.families.case import PROMPT, case_of
from tests.tiny import tiny_pipeline, tiny_text, tiny_transformer

LUMINA2 = FAMILIES["lumina2"]


@pytest.mark.parametrize(
    ("known", "size", "message"),
    [
        ((7, 4, 4), (4, 4), "a prompt of 7 words is too long, as this model knows 7 positions"),
        ((8, 1, 4), (4, 4), "2 x 2 tokens, as this model knows 1 rows and 4 columns"),
        ((8, 4, 2), (4, 6), "2 x 3 tokens, as this model knows 4 rows and 2 columns"),
    ],
)
def test_more_positions_than_the_tables_have_are_refused(known, size, message):
    """On a GPU the class itself would end the process. Seven words, and two cells a token."""
    net = tiny_transformer("lumina2", axes_lens=known)
    with pytest.raises(BadData, match=message):
        LUMINA2.run(net, torch.zeros(1, 16, *size), torch.ones(1), tiny_text("lumina2", 1))


def test_the_last_positions_can_be_used():
    net = tiny_transformer("lumina2", axes_lens=(8, 2, 3))
    out = LUMINA2.run(net, torch.zeros(1, 16, 4, 6), torch.ones(1), tiny_text("lumina2", 1))
    assert out.shape == (1, 16, 4, 6)


def test_the_empty_prompt_is_what_the_pipeline_guides_against():
    """Without the system's prompt, which all others have."""
    pipeline, length = tiny_pipeline("lumina2"), case_of("lumina2").length
    bee, empty = LUMINA2.encode_prompt(pipeline, [PROMPT, ""], length)
    *_, words, mask = pipeline.encode_prompt([PROMPT], True, max_sequence_length=length)
    assert torch.equal(empty["encoder_hidden_states"], words[mask.bool()])
    assert len(empty["encoder_hidden_states"]) == 1 < 100 < len(bee["encoder_hidden_states"])
