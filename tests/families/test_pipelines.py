"""Every convention of a family, against the real diffusers pipeline driven by an oracle.

The pipeline runs as users run it, from a prompt to a picture. Its transformer is intercepted: what
it was given is recorded, and it answers with the velocity that leads to a known latent.
"""

import copy
import inspect
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional

from asymlift.families import FAMILIES
from asymlift.families.base import Family, Text
from asymlift.maths.patches import image_to_tokens, tokens_to_image
from asymlift.maths.schedule import sigma_from_tau
from asymlift.runtime import third_party
from tests.tiny import GRID, lifted_pair, tiny_pipeline, tiny_text, tiny_transformer, tiny_vae

CALL = {"prompt": "a bee", "height": 32, "width": 48, "max_sequence_length": 12}
PATCH = 2


@dataclass(frozen=True)
class Wiring:
    """How a pipeline talks to its transformer; taken from the pipelines, not from our families."""

    read: Callable[[dict[str, Any]], tuple[Tensor, Tensor, Text]]  # its call -> map, time, text
    write: Callable[[Tensor], Any]  # map -> what the transformer answers
    start: Callable[[Tensor], Tensor]  # map -> the pipeline's argument `latents`
    unguided: dict[str, float]


WIRING = {
    "flux2": Wiring(
        read=lambda call: (
            tokens_to_image(call["hidden_states"], PATCH, GRID),
            call["timestep"],
            {"encoder_hidden_states": call["encoder_hidden_states"]},
        ),
        write=lambda image: image_to_tokens(image, PATCH),
        start=lambda image: functional.pixel_unshuffle(image, PATCH),
        unguided={"guidance_scale": 1.0},
    ),
    "sd3": Wiring(
        read=lambda call: (
            call["hidden_states"],
            call["timestep"],
            {k: call[k] for k in ("encoder_hidden_states", "pooled_projections")},
        ),
        write=lambda image: image,
        start=lambda image: image,
        unguided={"guidance_scale": 1.0},
    ),
    "zimage": Wiring(
        read=lambda call: (
            torch.stack(call["x"]).squeeze(2),
            call["t"],
            {"cap_feats": call["cap_feats"]},
        ),
        write=lambda image: list(image.unsqueeze(2)),
        start=lambda image: image,
        unguided={"guidance_scale": 0.0},
    ),
}


def intercept(net: Any, wiring: Wiring, answer: Callable[..., Tensor]) -> None:
    """Let `answer(map, time, text, call)` reply to the pipeline in place of this transformer."""
    signature = inspect.signature(type(net).forward)

    def forward(*args: Any, **kwargs: Any) -> tuple[Any]:
        call = dict(signature.bind(net, *args, **kwargs).arguments)
        return (wiring.write(answer(*wiring.read(call), call)),)

    net.forward = forward


def level(family: Family, time: Tensor) -> Tensor:
    """Undo the family's time, which is a straight line in all of these."""
    zero, one = (family.time(torch.tensor(t), GRID[0] * GRID[1]) for t in (0.0, 1.0))
    return (time - zero) / (one - zero)


def relative(got: Tensor, wanted: Tensor) -> float:
    return float((got - wanted).abs().max() / wanted.abs().max())


@torch.no_grad()
def disagreements(name: str, family: Family) -> dict[str, float]:
    """Run the pipeline to a picture; return how far it is from what the family says, in parts."""
    wiring, pipeline = WIRING[name], tiny_pipeline(name)
    net, vae = pipeline.transformer, pipeline.vae
    g = torch.Generator().manual_seed(0)
    image = functional.interpolate(torch.randn(1, 3, 4, 6, generator=g), (32, 48)).clamp(-1, 1)
    z0 = family.encode_latents(vae, image)
    calls: list[tuple[Tensor, Tensor, Tensor, Tensor]] = []

    def oracle(z_t: Tensor, time: Tensor, text: Text, call: dict[str, Any]) -> Tensor:
        tau = level(family, time)
        call.pop("self")
        raw = type(net).forward(net, **call)[0]  # what the real forward makes of this very call
        image_out, _, _ = wiring.read({**call, first_argument: raw})
        calls.append((z_t, time, tau, image_out))
        return family.sign * (z_t - z0) / tau.view(-1, 1, 1, 1)

    first_argument = list(inspect.signature(type(net).forward).parameters)[1]
    intercept(net, wiring, oracle)
    options = {**CALL, **wiring.unguided, "num_inference_steps": 4, "output_type": "pt"}
    picture = pipeline(**options).images

    del net.forward
    text = family.collate(family.encode_prompt(pipeline, [CALL["prompt"]], 12))
    z_t, time, _, raw = calls[1]
    alone = vae.decode(vae.encode(image).latent_dist.mode()).sample.clamp(-1, 1)
    taus = torch.stack([tau for _, _, tau, _ in calls]).flatten()
    return {
        "time": float((taus - pipeline.scheduler.sigmas[:-1]).abs().max()),
        "picture": relative(2 * picture - 1, alone),
        "decode": relative(family.decode_latents(vae, z0), alone),
        "run": relative(family.run(net, z_t, time, text), raw),
    }


@pytest.mark.parametrize("name", FAMILIES)
def test_the_real_pipeline_agrees(name):
    """Time, sign, latents, prompt embeddings, ids and packing: all as the pipeline has them."""
    for part, error in disagreements(name, FAMILIES[name]).items():
        assert error < 2e-5, part


@torch.no_grad()
def test_the_pipeline_of_flux2_dev_agrees():
    """It has other text encoders, and tells its transformer the guidance."""
    family, net = FAMILIES["flux2"], tiny_transformer("flux2", guidance_embeds=True)
    pipeline = third_party.library("diffusers").Flux2Pipeline(
        transformer=net,
        vae=tiny_vae("flux2"),
        scheduler=tiny_pipeline("flux2").scheduler,
        text_encoder=None,
        tokenizer=None,
    )
    pipeline.set_progress_bar_config(disable=True)
    calls = []

    def spy(z_t: Tensor, time: Tensor, text: Text, call: dict[str, Any]) -> Tensor:
        del call["self"]
        raw = tokens_to_image(type(net).forward(net, **call)[0], PATCH, GRID)
        calls.append((z_t, time, text, raw))
        return raw

    intercept(net, WIRING["flux2"], spy)
    words = tiny_text("flux2", 1)["encoder_hidden_states"]
    pipeline(prompt_embeds=words, height=32, width=48, num_inference_steps=2, output_type="latent")
    del net.forward
    assert len(calls) == 2
    for z_t, time, text, raw in calls:
        assert torch.equal(family.run(net, z_t, time, text), raw)


WRONG = {
    "sign": lambda family: replace(family, sign=-family.sign),
    "time reversed": lambda family: replace(
        family, time=lambda tau, n, right=family.time: right(1 - tau, n)
    ),
    "time scaled": lambda family: replace(
        family, time=lambda tau, n, right=family.time: right(tau / 1000, n)
    ),
    "latents not normalised": lambda family: replace(
        family, encode_latents=lambda vae, image: vae.encode(image).latent_dist.mode()
    ),
}


@pytest.mark.parametrize("fact", WRONG)
@pytest.mark.parametrize("name", FAMILIES)
def test_a_wrong_convention_is_caught(name, fact):
    errors = disagreements(name, WRONG[fact](FAMILIES[name]))
    assert max(errors.values()) > 0.05, errors


@pytest.mark.parametrize("steps", [2, 7])
@pytest.mark.parametrize("name", FAMILIES)
def test_the_stock_pipeline_samples_the_lifted_model(name, steps):
    """From matched noise, the picture is s A z of the latent pipeline's last latent."""
    assert sampling_error(name, steps) < 1e-4


@torch.no_grad()
def sampling_error(name: str, steps: int) -> float:
    family, wiring = FAMILIES[name], WIRING[name]
    pair = lifted_pair(name, dtype=torch.float32)
    g = torch.Generator().manual_seed(0)
    eps = torch.randn(1, GRID[0] * GRID[1], len(pair.A), generator=g)
    taus = torch.linspace(1, 0, steps + 1, dtype=torch.float64)[:-1]

    stand_in = copy.deepcopy(pair.pixel.net)  # the pipeline looks at its config

    def pixels(x_t: Tensor, time: Tensor, text: Text, call: dict[str, Any]) -> Tensor:
        tokens = image_to_tokens(x_t, PATCH)
        u = pair.pixel(tokens, level(family, time), text, GRID, floor=1e-6)
        return family.sign * tokens_to_image(u, PATCH, GRID)

    intercept(stand_in, wiring, pixels)
    z = _last_state(name, pair.latent.net, eps @ pair.A, taus)
    x = _last_state(name, stand_in, eps, sigma_from_tau(taus, pair.s))
    return relative(x, pair.s * z @ pair.A.T)


def _last_state(name: str, net: Any, noise: Tensor, levels: Tensor) -> Tensor:
    """Run the stock pipeline from this noise over these levels; return its last tokens."""
    wiring, states = WIRING[name], []
    pipeline = tiny_pipeline(name, transformer=net)
    diffusers = third_party.library("diffusers")
    pipeline.scheduler = diffusers.FlowMatchEulerDiscreteScheduler()  # the levels as they are
    if hasattr(pipeline.vae, "bn"):
        pipeline.vae.bn = torch.nn.BatchNorm2d(
            noise.shape[-1]
        )  # it is applied at the end, to no use

    def keep(pipe: Any, step: int, time: Tensor, state: dict[str, Tensor]) -> dict[str, Tensor]:
        states.append(state["latents"])
        return state

    pipeline(
        **CALL,
        **wiring.unguided,
        latents=wiring.start(tokens_to_image(noise, PATCH, GRID)),
        sigmas=levels.tolist(),
        num_inference_steps=len(levels),
        output_type="latent",
        callback_on_step_end=keep,
    )
    last = states[-1]
    return last if last.ndim == 3 else image_to_tokens(last, PATCH)
