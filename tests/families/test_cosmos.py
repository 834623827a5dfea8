"""Cosmos-Predict2: its Karras levels, its one frame, and its channel of padding."""

import pytest
import torch

from asymlift.errors import BadData, Unavailable
from asymlift.families import FAMILIES
from asymlift.model.loading import load_pipeline
from asymlift.runtime import third_party
from tests.tiny import (
    lifted_pair,
    tiny_pipeline,
    tiny_text,
    tiny_transformer,
    write_pipeline,
)

COSMOS = FAMILIES["cosmos"]


@pytest.mark.parametrize("steps", [35, 101])
def test_the_shift_has_the_middle_one_of_the_pipelines_levels(steps):
    scheduler = tiny_pipeline("cosmos").scheduler
    scheduler.set_timesteps(sigmas=torch.linspace(0, 1, steps).tolist())
    ratio = scheduler.sigmas[steps // 2]  # of noise to picture: tau / (1 - tau), 1 in the middle
    shift = COSMOS.base_shift(scheduler.config, 4096)
    assert COSMOS.base_shift({"use_karras_sigmas": True}, 4096) == shift
    assert shift == pytest.approx(float(ratio), rel=1e-4) == pytest.approx(2.51, abs=0.01)


def test_more_than_one_frame_to_a_token_is_refused():
    with pytest.raises(BadData, match=r"cosmos: patch_size is \[2, 2, 2\], not \[1, 2, 2\]"):
        COSMOS.geometry({"patch_size": (2, 2, 2)}, {})


def test_the_weights_of_the_mask_of_padding_are_copied():
    pair = lifted_pair("cosmos")
    latent, pixel = (flow.net.patch_embed.proj.weight for flow in (pair.latent, pair.pixel))
    assert latent.shape[1] == pair.geometry.d + 4 and pixel.shape[1] == pair.geometry.D + 4
    assert torch.equal(latent[:, -4:], pixel[:, -4:])


def test_the_mask_that_the_network_gets_hides_nothing():
    """The pipeline's is as large as the picture; here it is as large as the latent."""
    net, text = tiny_transformer("cosmos"), tiny_text("cosmos", 1)
    latent, time = torch.randn(1, 4, 8, 12), torch.tensor([0.4])
    whole = net(latent.unsqueeze(2), time, padding_mask=torch.zeros(1, 1, 32, 48), **text)
    assert torch.equal(COSMOS.run(net, latent, time, text), whole.sample.squeeze(2))


def test_without_its_guardrail_there_is_no_pipeline(tmp_path, monkeypatch):
    """A package of NVIDIA's; nothing but the tests puts another in its place."""
    write_pipeline(tmp_path, "cosmos")
    module = third_party.library("diffusers.pipelines.cosmos.pipeline_cosmos2_text2image")

    def missing() -> None:
        raise ImportError("`cosmos_guardrail` is not installed.")

    monkeypatch.setattr(module, "CosmosSafetyChecker", missing)
    with pytest.raises(Unavailable, match=r"needs a package.*`cosmos_guardrail` is not installed"):
        load_pipeline(tmp_path)
