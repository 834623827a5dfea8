import json

import pytest
import torch
from torch.testing import assert_close

from asymlift.embedded import IMAGE_SIZE
from asymlift.embedded.build import CELL, VARIANTS, build, linear_code, normalise, optimise
from asymlift.embedded.scenes import make_scenes
from asymlift.runtime import third_party


def test_training_ends_on_the_average_of_its_steps():
    net = torch.nn.Linear(1, 1, bias=False)
    seen = []

    def loss_at(step):
        seen.append(net.weight.item())
        return (net.weight * (-1) ** step).sum()  # pushes back and forth

    optimise("toy", net, loss_at, steps=40, lr=0.1, betas=(0.0, 0.9), average=0.9)

    assert min(seen) < net.weight.item() < max(seen)


def test_the_linear_code_is_a_scaled_basis_whose_channels_are_equally_strong():
    image = make_scenes(range(128), seed=1, size=IMAGE_SIZE).image
    filters = linear_code(image)

    A = filters.flatten(1).T
    code = torch.nn.functional.conv2d(normalise(image), filters, stride=CELL)

    assert_close(A.T @ A, A.square().sum(0).mean() * torch.eye(len(filters)))
    assert_close(code.square().mean((0, 2, 3)), torch.ones(len(filters)))


@pytest.mark.slow
def test_a_build_makes_a_pipeline_folder_and_keeps_what_is_there(tmp_path):
    variant = VARIANTS["weak"]
    build(tmp_path, variant, seed=0, scale=0.002)
    folder = tmp_path / variant.folder
    weights = folder / "transformer" / "diffusion_pytorch_model.safetensors"
    first, record = weights.read_bytes(), json.loads((folder / "build.json").read_text())

    build(tmp_path, variant, seed=0, scale=0.002)

    assert third_party.library("diffusers").DiffusionPipeline.from_pretrained(folder)
    assert weights.read_bytes() == first
    assert json.loads((folder / "build.json").read_text()) == record
    assert set(record["cpu_seconds"]) == {"perceptual", "metrics", "vae", "transformer"}
