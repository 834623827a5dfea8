"""What is peculiar to Qwen-Image 2.1: slots of four tokens, and opacity."""

import pytest
import torch

from asymlift.errors import BadData
from asymlift.families import FAMILIES
from tests.tiny import tiny_pipeline, tiny_text, tiny_transformer, tiny_vae

FAMILY = FAMILIES["qwenimage21"]


@pytest.mark.parametrize(("size", "fits"), [((2, 2), True), ((4, 3), True), ((3, 6), False)])
def test_a_picture_is_a_number_of_slots(size, fits):
    net, text = tiny_transformer("qwenimage21"), tiny_text("qwenimage21", 1)
    latent = torch.zeros(1, 4, *size)
    if fits:
        assert FAMILY.run(net, latent, torch.ones(1), text).shape == latent.shape
        return
    with pytest.raises(BadData, match=r"of 3 x 6 tokens, as they cannot be cut into slots of 4"):
        FAMILY.run(net, latent, torch.ones(1), text)


@torch.no_grad()
def test_pictures_are_opaque():
    """The VAE sees a fourth channel, of ones."""
    vae, image = tiny_vae("qwenimage21"), torch.rand(1, 3, 32, 32)
    z = FAMILY.encode_latents(vae, image)
    mean, std = (
        torch.tensor(v).view(1, -1, 1, 1) for v in (vae.config.latents_mean, vae.config.latents_std)
    )
    for alpha, same in ((1.0, True), (-1.0, False)):
        seen = torch.cat([image, torch.full_like(image[:, :1], alpha)], 1).unsqueeze(2)
        raw = vae.encode(seen).latent_dist.mode().squeeze(2)
        assert torch.allclose((raw - mean) / std, z, atol=1e-5) is same
    assert FAMILY.decode_latents(vae, z).shape == image.shape


def test_a_prompt_of_any_length_is_embedded_up_to_ours():
    """The pipeline has none."""
    pipeline = tiny_pipeline("qwenimage21")
    samples = FAMILY.encode_prompt(pipeline, ["b" * 1200])
    assert samples[0]["encoder_hidden_states"].shape[0] == 1024
