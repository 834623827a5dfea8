"""A case belongs to its family, and leaves nothing out that the real pipeline does."""

import functools
import importlib
import inspect
import math
from pathlib import Path
from typing import Any

import pytest

from asymlift.families import FAMILIES
from asymlift.families.flux2 import DEFAULT_STEPS
from tests.families.case import case_of
from tests.tiny import tiny_pipeline, tiny_transformer


def test_a_family_its_module_and_its_case_have_one_name():
    for name, family in FAMILIES.items():
        module = importlib.import_module(f"asymlift.families.{name}")
        assert family.name == name and getattr(module, name.upper()) is family
    files = Path(__file__).with_name("cases").glob("[a-z]*.py")
    assert sorted(file.stem for file in files) == sorted(FAMILIES)


@pytest.mark.parametrize("name", FAMILIES)
def test_what_channels_changes_and_the_answers_place_are_arguments_of_the_class(name):
    """diffusers takes a config's unknown fields without a word."""
    family, net = FAMILIES[name], type(tiny_transformer(name))
    unknown = family.channels(48).keys() - inspect.signature(net.__init__).parameters
    assert not unknown, f"{family.transformer} has no {sorted(unknown)}: see `channels`"
    given = list(inspect.signature(net.forward).parameters)[1:]
    answer = case_of(name).answer
    assert answer in given, f"which of {given} is the latent? set the case's `answer`"


class Told(Exception):
    """The shift that a pipeline asks its scheduler for."""


@pytest.mark.parametrize("kind", ["exponential", "linear"])
@pytest.mark.parametrize("name", FAMILIES)
def test_the_case_has_the_shift_that_the_real_pipeline_asks_for(name, kind):
    """And so has the family, for this number of tokens; under a scheduler that wants one."""
    family, case, pipeline = FAMILIES[name], case_of(name), tiny_pipeline(name)
    scheduler, num_tokens = pipeline.scheduler, case.grid[0] * case.grid[1]
    scheduler.register_to_config(use_dynamic_shifting=True, time_shift_type=kind)
    own = scheduler.set_timesteps

    @functools.wraps(own)
    def set_timesteps(*args: Any, **kwargs: Any) -> None:
        raise Told(inspect.signature(own).bind(*args, **kwargs).arguments.get("mu"))

    scheduler.set_timesteps = set_timesteps
    with pytest.raises(Told) as told:
        case.drive(pipeline, {**case.call, "num_inference_steps": DEFAULT_STEPS})
    (mu,) = told.value.args

    module = importlib.import_module(type(pipeline).__module__)
    stated = case.mu(module, num_tokens, DEFAULT_STEPS)
    assert (mu is None) == (stated is None), f"the pipeline's mu is {mu}; set the case's `mu`"
    if mu is not None:
        assert stated == pytest.approx(mu)
        shift = math.exp(mu) if kind == "exponential" else mu
        assert family.base_shift(scheduler.config, num_tokens) == pytest.approx(shift), "base_shift"
