"""SiT, of which diffusers has no pipeline: its convention is held against its own definition."""

import math
from itertools import pairwise

import pytest
import torch
from torch.func import jvp

from asymlift.errors import BadData
from asymlift.families import FAMILIES
from asymlift.families.base import matching_modules
from asymlift.families.sit import NO_CLASS, class_of
from asymlift.runtime import third_party
from tests.families.case import FOUR_LEVELS
from tests.tiny import tiny_pipeline, tiny_text, tiny_transformer

SIT = FAMILIES["sit"]
NAMES = {"tench": 0, "Tinca tinca": 0, "goldfish": 1, "white shark": 2}


@pytest.mark.parametrize("tau", [0.1, 0.5, 0.9])
def test_time_and_sign_are_those_of_the_linear_path(tau):
    """x(t) = t data + (1 - t) noise, and the network is told t and says dx/dt."""
    data, noise = torch.randn(2, 5, dtype=torch.float64)
    t = SIT.time(torch.tensor(tau, dtype=torch.float64), 16)
    x, velocity = jvp(lambda t: t * data + (1 - t) * noise, (t,), (torch.ones_like(t),))
    torch.testing.assert_close(x, (1 - tau) * data + tau * noise)
    torch.testing.assert_close(velocity, SIT.sign * (noise - data))


def test_euler_from_noise_over_that_path_ends_on_the_data():
    """As SiT's own sampler goes: t from 0 up to 1, along what the network says."""
    data, x = torch.randn(2, 5, dtype=torch.float64)
    times = torch.linspace(0, 1, 8, dtype=torch.float64)
    for t, after in pairwise(times):
        tau = 1 - t
        said = SIT.sign * (x - data) / tau  # of the network that knows the data
        torch.testing.assert_close(SIT.time(tau, 16), t)
        x = x + (after - t) * said
    torch.testing.assert_close(x, data)


def test_the_class_tells_the_times_between_0_and_1_apart():
    """Times are embedded as they are: nothing multiplies them by 1000 on the way."""
    net = tiny_transformer("sit")
    embed = net.transformer_blocks[0].norm1.emb.time_proj
    t = torch.tensor([0.0, 0.25, 1.0])
    frequencies = torch.exp(-math.log(10000) * torch.arange(128) / 127)  # SiT's own: over 128
    waves = torch.cat([torch.cos(t[:, None] * frequencies), torch.sin(t[:, None] * frequencies)], 1)
    torch.testing.assert_close(embed(t), waves)
    theirs = torch.exp(-math.log(10000) * torch.arange(128) / 128)
    assert float((torch.sin(frequencies) - torch.sin(theirs)).abs().max()) < 0.003


def test_sit_xl_2_has_the_paths_and_sizes_that_are_stated():
    """With a learned variance, as it was published."""
    with torch.device("meta"):
        net = third_party.library("diffusers").DiTTransformer2DModel(out_channels=8)
    sizes = SIT.geometry(dict(net.config), {"latent_channels": 4} | FOUR_LEVELS)
    assert sizes == SIT.sizes and (sizes.d, sizes.D) == (16, 768)
    assert sum(p.numel() for p in net.get_submodule(SIT.first).parameters()) == (16 + 1) * 1152
    assert len(net.get_submodule(SIT.last).weight) == 2 * 16
    assert len(matching_modules(net, SIT.lora_targets)) == 28 * 5


def test_a_picture_that_is_not_square_is_refused():
    text, time = tiny_text("sit", 1), torch.ones(1)
    with pytest.raises(BadData, match=r"of 4 x 6 tokens, as its class draws squares only"):
        SIT.run(tiny_transformer("sit"), torch.zeros(1, 4, 8, 12), time, text)


def test_labels_are_dropped_by_nobody_but_the_trainer():
    net, text = tiny_transformer("sit").train(), tiny_text("sit", 2)
    latent, time = torch.randn(2, 4, 8, 8), torch.tensor([0.2, 0.8])
    outs = [SIT.run(net, latent, time, text) for _ in range(8)]
    assert all(torch.equal(out, outs[0]) for out in outs)


def test_the_empty_prompt_is_the_class_that_stands_for_none():
    net, latent, time = tiny_transformer("sit"), torch.randn(1, 4, 8, 8), torch.ones(1)
    last = net.config.num_embeds_ada_norm
    none, named = (
        SIT.run(net, latent, time, {"class_labels": torch.tensor([label])})
        for label in (NO_CLASS, last)
    )
    assert torch.equal(none, named)


@pytest.mark.parametrize(
    ("prompt", "label"),
    [("2", 2), (" tench ", 0), ("Tinca tinca", 0), ("white shark", 2), ("", NO_CLASS)],
)
def test_a_caption_is_a_number_a_name_or_nothing(prompt, label):
    assert class_of(prompt, NAMES) == label


@pytest.mark.parametrize(
    ("prompt", "message"),
    [
        ("3", r"no class '3'; a caption is a number, 0 to 2, or a name of `id2label`"),
        ("-1", "no class '-1'"),
        ("a goldfish", r"no class 'a goldfish' \(did you mean 'goldfish'\?\)"),
    ],
)
def test_a_caption_that_is_no_class_is_refused(prompt, message):
    with pytest.raises(BadData, match=message):
        class_of(prompt, NAMES)


def test_a_folder_that_lists_no_classes_is_told_how():
    pipeline = tiny_pipeline("sit")
    pipeline.labels = {}
    with pytest.raises(BadData, match=r'add them, `"id2label": .*tench, Tinca tinca'):
        SIT.encode_prompt(pipeline, ["2"], None)
