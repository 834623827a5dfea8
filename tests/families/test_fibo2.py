"""FIBO 2 reads captions in JSON: what the model sees is what the pipeline's own call shows it."""

import sys

import pytest
import torch

from asymlift.families.fibo2 import FIBO2
from tests.families.case import case_of
from tests.tiny import tiny_pipeline

SPACED = '{"short_description": "a bee", "objects": [], "aesthetics": {"preference_score": "low"}}'


@pytest.mark.parametrize("prompt", ["a bee", "17", SPACED, "{}"])
@torch.no_grad()
def test_a_caption_takes_the_form_that_the_pipeline_gives_it(prompt):
    case, pipeline, seen = case_of("fibo2"), tiny_pipeline("fibo2"), []

    def spy(hidden_states, encoder_hidden_states, **kwargs):
        seen.append(encoder_hidden_states)
        return (hidden_states,)

    pipeline.transformer.forward = spy
    size = {"height": case.height, "width": case.width}
    pipeline(prompt, **size, guidance_scale=1.0, num_inference_steps=1, output_type="latent")
    (sample,) = FIBO2.encode_prompt(pipeline, [prompt], None)
    assert torch.equal(sample["encoder_hidden_states"].transpose(0, 1)[None], seen[0])


@torch.no_grad()
def test_the_empty_prompt_is_what_the_pipeline_guides_away_from():
    pipeline = tiny_pipeline("fibo2")
    default = sys.modules[type(pipeline).__module__].DEFAULT_NEGATIVE_PROMPT
    assert default.startswith('{"short_description":""')
    empty, written = (FIBO2.encode_prompt(pipeline, [p], None)[0] for p in ("", "a bee"))
    wanted = pipeline.encode_prompt(default)[0][0].transpose(0, 1)
    assert torch.equal(empty["encoder_hidden_states"], wanted)
    assert len(empty["encoder_hidden_states"]) > len(written["encoder_hidden_states"])
