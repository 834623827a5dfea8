"""Pictures to go by: as the real pipelines have them; the lifted model reads x_ref over s."""

import inspect
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from torch import Tensor

from asymlift.data.pictures import encode_png, float_to_image, image_to_float, tensor_to_picture
from asymlift.data.reference_picture import read_reference
from asymlift.errors import BadData, BadRecipe
from asymlift.families import FAMILIES, flux2
from asymlift.families.references import (
    check_references,
    reference_rule,
    references_of,
    with_references,
)
from asymlift.families.refusals import SAME_NETWORK
from asymlift.maths.asymmetric import calibrate, project
from asymlift.maths.color import ColorCode
from asymlift.maths.patches import tokens_to_image
from asymlift.maths.schedule import sigma_grid, tau_from_sigma
from asymlift.model.rows import Rows
from asymlift.model.sampling import SampleSettings, sample_latents, solve_pixels
from asymlift.runtime import third_party
from tests.families.case import case_of
from tests.tiny import Pair, lifted_pair, tiny_pipeline, tiny_text, tiny_transformer, tiny_vae

TAKERS = [name for name, family in FAMILIES.items() if not isinstance(family.references, str)]
GRIDS = ((3, 5), (6, 2))  # of two references: tokens in rows and columns
SIGMA = (0.23, 0.91)  # one per sample


def relative(got: Tensor, wanted: Tensor) -> float:
    return float((got - wanted).abs().max() / wanted.abs().max())


# -- the lift


def clean_pairs(pair: Pair) -> tuple[list[Tensor], list[Tensor]]:
    """The same references as latent maps, and as pictures with anything outside the subspace."""
    A, p, q = pair.A, pair.geometry.pixel_patch, pair.geometry.patch
    g = torch.Generator().manual_seed(5)
    latents, pictures = [], []
    for rows, columns in GRIDS:
        z = torch.randn(2, rows * columns, pair.geometry.d, generator=g, dtype=torch.float64)
        outside = torch.randn(2, rows * columns, len(A), generator=g, dtype=torch.float64)
        x = pair.s * z @ A.T + outside - project(outside, A)
        latents.append(tokens_to_image(z, q, (rows, columns)))
        pictures.append(tokens_to_image(x, p, (rows, columns)))
    return latents, pictures


@torch.no_grad()
def lift_error(pair: Pair, latents: list[Tensor], pictures: list[Tensor]) -> float:
    """u against s k v A^T + (1 - s) k x_par + x_perp / sigma, both models run beside references."""
    A, s, grid = pair.A, pair.s, pair.grid
    g = torch.Generator().manual_seed(0)
    x_t = torch.randn(2, grid[0] * grid[1], len(A), generator=g, dtype=torch.float64)
    sigma = torch.tensor(SIGMA, dtype=torch.float64)
    k, tau = calibrate(sigma.view(-1, 1, 1), s)
    u = pair.pixel(x_t, sigma, with_references(pair.text, pictures), grid, floor=1e-6)
    beside = with_references(pair.text, latents)
    v = pair.latent(k * x_t @ A, tau.flatten(), beside, grid)
    x_par = project(x_t, A)
    wanted = s * k * v @ A.T + (1 - s) * k * x_par + (x_t - x_par) / sigma.view(-1, 1, 1)
    return relative(u, wanted)


@pytest.mark.parametrize("s", [0.7, 1.9])
@pytest.mark.parametrize("name", TAKERS)
def test_the_lifted_model_reads_clean_pictures_as_the_latent_model_reads_clean_latents(name, s):
    """Whatever they have outside the subspace, right after the lift."""
    pair = lifted_pair(name, s=s)
    latents, pictures = clean_pairs(pair)
    assert lift_error(pair, latents, pictures) <= 1e-12
    assert lift_error(pair, latents[::-1], pictures) > 1e-3  # their order counts


@pytest.mark.parametrize("name", TAKERS)
def test_the_gain_of_the_noisy_tokens_would_be_wrong_for_clean_ones(name):
    pair = lifted_pair(name)
    latents, pictures = clean_pairs(pair)
    k, _ = calibrate(torch.tensor(SIGMA, dtype=torch.float64).view(-1, 1, 1, 1), pair.s)
    noisy = [k * pair.s * picture for picture in pictures]  # so that the network reads k x_ref
    assert lift_error(pair, latents, noisy) > 1e-3


@pytest.mark.parametrize("guidance", [1.0, 3.0])
@pytest.mark.parametrize("name", TAKERS)
def test_beside_references_the_pixel_sampler_follows_the_latent_one(name, guidance):
    pair = lifted_pair(name)
    latents, pictures = clean_pairs(pair)
    settings = SampleSettings("euler", 5, guidance=guidance, clamp=False)
    null = tiny_text(name, 2, seed=9, dtype=torch.float64)
    sigmas, grid = sigma_grid(5, 3.0), pair.grid
    g = torch.Generator().manual_seed(0)
    eps = torch.randn(2, grid[0] * grid[1], len(pair.A), generator=g, dtype=torch.float64)
    color = ColorCode("rgb", mean=(0.5, 0.5, 0.5), std=0.5)

    pixel_texts = [with_references(text, pictures) for text in (pair.text, null)]
    x = solve_pixels(pair.pixel, eps, *pixel_texts, sigmas, settings, color, grid)

    taus = tau_from_sigma(sigmas, pair.s)

    def latent(*texts: Any) -> Tensor:
        return sample_latents(pair.latent, eps @ pair.A, *texts, taus, settings, grid)

    z = latent(*(with_references(text, latents) for text in (pair.text, null)))
    assert relative(x, pair.s * z @ pair.A.T) < 1e-10
    assert relative(latent(pair.text, null), z) > 0.01  # they do guide


@pytest.mark.parametrize("name", TAKERS)
@torch.no_grad()
def test_in_bf16_references_are_read_in_float32_and_leak_nothing(name):
    """As the noisy tokens are: their first map, too, stays outside autocast."""
    _, pictures = clean_pairs(lifted_pair(name))
    pair = lifted_pair(name, dtype=torch.float32, precision=torch.bfloat16)
    text = with_references(pair.text, [picture.float() for picture in pictures])
    read = []
    pair.pixel.net.get_submodule(FAMILIES[name].first).register_forward_pre_hook(
        lambda module, given: read.append(given[0].dtype)
    )
    x_t, sigma = torch.randn(2, 24, pair.geometry.d) @ pair.A.T, torch.tensor(SIGMA)
    u = pair.pixel(x_t, sigma, text, pair.grid, floor=1e-6)
    leak = (u - project(u, pair.A)) * sigma.view(-1, 1, 1)
    assert set(read) == {torch.float32}
    assert leak.norm() < 1e-6 * u.norm()


# -- the real pipelines

PIPELINES = [("flux2", "Flux2KleinPipeline"), ("flux2", "Flux2Pipeline")]


def test_the_pipeline_of_every_family_that_takes_references_is_asked():
    assert {name for name, _ in PIPELINES} == set(TAKERS)


def picture_file(folder: Path, size: tuple[int, int], seed: int = 0) -> Path:
    """A picture of (width, height), coarse enough that resizing it leaves something of it."""
    g = torch.Generator().manual_seed(seed)
    noise = torch.rand(1, 3, 9, 7, generator=g)
    image = torch.nn.functional.interpolate(noise, size[::-1], mode="bilinear")[0]
    path = folder / f"{size[0]}x{size[1]}.png"
    path.write_bytes(encode_png(float_to_image(2 * image - 1)))
    return path


def without_words(name: str, kind: str) -> Any:
    """A pipeline of the family that has no text encoder and is given embeddings."""
    made = getattr(third_party.library("diffusers"), kind)
    text_parts = [p for p in inspect.signature(made).parameters if p.startswith(("text", "token"))]
    pipeline = made(
        transformer=tiny_transformer(name, guidance_embeds=True),
        vae=tiny_vae(name),
        scheduler=case_of(name).scheduler(),
        **dict.fromkeys(text_parts),
    )
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def recorded(net: Any) -> list[tuple[dict[str, Any], Tensor]]:
    """Every call of this transformer from now on, and what it answers."""
    calls: list[tuple[dict[str, Any], Tensor]] = []

    def forward(**call: Any) -> Any:
        answer = type(net).forward(net, **call)
        calls.append((call, answer[0]))
        return answer

    net.forward = forward
    return calls


SIZES = [[(70, 101)], [(64, 65), (131, 72)]]  # (width, height) of each reference


@pytest.mark.parametrize("sizes", SIZES, ids=["one", "two"])
@pytest.mark.parametrize(("name", "kind"), PIPELINES)
@torch.no_grad()
def test_the_real_pipeline_reads_references_as_the_family_does(name, kind, sizes, tmp_path):
    """Pixels, latents, position ids, order and what is cut off the answer; guided too."""
    family, case, first = FAMILIES[name], case_of(name), FAMILIES[name].pipelines[0]
    pipeline = tiny_pipeline(name) if kind == first else without_words(name, kind)
    paths = [picture_file(tmp_path, size, seed) for seed, size in enumerate(sizes)]
    net = pipeline.transformer
    calls = recorded(net)
    asked = {"prompt": ["a bee", "a cat"], "guidance_scale": 4.0, "max_sequence_length": 12}
    if pipeline.text_encoder is None:
        asked = {"prompt_embeds": tiny_text(name, 2)["encoder_hidden_states"]}
    with_pictures = {"image": [Image.open(path) for path in paths]}
    size = {"height": case.height, "width": case.width}
    steps = {"num_inference_steps": 2, "output_type": "latent"}
    pipeline(**asked, **with_pictures, **size, **steps)

    theirs = list(calls)
    assert len(theirs) == (2 if pipeline.text_encoder is None else 4)  # guided by two passes
    rule, patch = reference_rule(family), case.sizes.pixel_patch
    references = [
        family.encode_latents(pipeline.vae, image_to_float(read.image).unsqueeze(0)).expand(
            2, -1, -1, -1
        )
        for read in (read_reference(path, rule, patch) for path in paths)
    ]
    num = case.grid[0] * case.grid[1]
    for call, raw in theirs:
        z_t = tokens_to_image(call["hidden_states"][:, :num], case.sizes.patch, case.grid)
        text = {k: call[k] for k in ("encoder_hidden_states", "guidance") if call[k] is not None}
        ours = family.run(net, z_t, call["timestep"], with_references(text, references))
        said, _ = calls[-1]
        assert torch.equal(said["img_ids"], call["img_ids"][0])
        assert relative(said["hidden_states"], call["hidden_states"]) < 2e-5
        answered = tokens_to_image(raw[:, :num], case.sizes.patch, case.grid)
        assert relative(ours, answered) < 2e-5
        alone = family.run(net, z_t, call["timestep"], text)
        assert relative(alone, answered) > 0.01


WRONG = {
    "moments closer": lambda patch, maps: patch.setattr(flux2, "APART", 1) or maps,
    "another order": lambda patch, maps: maps[::-1],
    "rows for columns": lambda patch, maps: [one.mT for one in maps],
}


@pytest.mark.parametrize("fact", [None, *WRONG])
@torch.no_grad()
def test_the_same_tokens_at_other_places_are_another_answer(fact, monkeypatch):
    """So the agreement with the pipeline means something; with all right it is bit for bit."""
    family, case, pipeline = FAMILIES["flux2"], case_of("flux2"), tiny_pipeline("flux2")
    calls = recorded(pipeline.transformer)
    g = torch.Generator().manual_seed(0)
    pixels = [float_to_image(torch.randn(3, *size, generator=g)) for size in ((64, 72), (80, 64))]
    pictures = {"image": [tensor_to_picture(one) for one in pixels]}
    pipeline(**case.call, **pictures, num_inference_steps=1, output_type="latent", generator=g)
    [(call, raw)] = calls
    drawn, *maps = [
        tokens_to_image(tokens, 2, grid)
        for tokens, grid in zip(
            call["hidden_states"].split([24, 72, 80], dim=1),
            (case.grid, (8, 9), (10, 8)),
            strict=True,
        )
    ]
    wanted = tokens_to_image(raw[:, :24], 2, case.grid)
    if fact:
        maps = WRONG[fact](monkeypatch, maps)
    text = with_references({"encoder_hidden_states": call["encoder_hidden_states"]}, maps)
    ours = family.run(pipeline.transformer, drawn, call["timestep"], text)
    assert torch.equal(ours, wanted) if fact is None else relative(ours, wanted) > 1e-3


class Seen(Exception):
    """The picture that a pipeline's VAE is given."""


def given_to_the_vae(kind: str, path: Path) -> Tensor:
    pipeline = without_words("flux2", kind)

    def encode(image: Tensor) -> None:
        raise Seen(image)

    pipeline.vae.encode = encode
    words = tiny_text("flux2", 1)["encoder_hidden_states"]
    with pytest.raises(Seen) as seen:
        pipeline(prompt_embeds=words, guidance_scale=1.0, image=Image.open(path))
    (image,) = seen.value.args
    return image


@pytest.mark.parametrize(
    "size", [(64, 64), (65, 513), (559, 71), (1024, 1024), (1024, 1031), (2500, 1303), (400, 3100)]
)
@pytest.mark.parametrize("kind", ["Flux2KleinPipeline", "Flux2Pipeline"])
def test_a_reference_comes_to_the_size_that_the_pipeline_makes_of_it(kind, size, tmp_path):
    """Over a million pixels it is reduced; then its middle is cut to whole tokens."""
    path = picture_file(tmp_path, size)
    ours = read_reference(path, reference_rule(FAMILIES["flux2"]), 8).image
    assert relative(image_to_float(ours), given_to_the_vae(kind, path)[0]) < 1e-6
    assert ours.shape[1] * ours.shape[2] <= 1024**2


@pytest.mark.parametrize("size", [(63, 100), (100, 63), (64, 513), (513, 64)])
@pytest.mark.parametrize("kind", ["Flux2KleinPipeline", "Flux2Pipeline"])
def test_what_the_pipeline_refuses_is_refused(kind, size, tmp_path):
    path = picture_file(tmp_path, size)
    said = f"{path.name}: {size[0]} x {size[1]} pixels; this model takes pictures of at least 64"
    with pytest.raises(BadData, match=said):
        read_reference(path, reference_rule(FAMILIES["flux2"]), 8)
    with pytest.raises(ValueError, match=r"too small|too extreme"):
        given_to_the_vae(kind, path)


# -- how they travel, and who takes none


def test_references_keep_their_order_and_belong_to_samples():
    text = {"words": torch.arange(3.0), "lines": [torch.ones(i) for i in range(3)]}
    assert references_of(text) == []
    maps = [torch.randn(3, 4, 2 * n, 2) for n in range(1, 13)]  # more than there are digits
    beside = with_references(text, maps)
    assert all(a is b for a, b in zip(references_of(beside), maps, strict=True))
    assert references_of(text) == []  # which is as it was

    two = Rows([2, 0], 3, torch.device("cpu")).take_text(beside)
    for taken, whole in zip(references_of(two), maps, strict=True):
        assert torch.equal(taken, whole[[2, 0]])


@pytest.mark.parametrize("name", [name for name in FAMILIES if name not in TAKERS])
def test_a_family_that_takes_none_says_so(name):
    with pytest.raises(BadRecipe, match=f"^{name} takes no reference pictures: .*[a-z]$"):
        reference_rule(FAMILIES[name])


@pytest.mark.parametrize(
    "pipeline", ["Flux2KleinKVPipeline", "Flux2KleinInpaintPipeline", "SomePipeline", ["a", "b"]]
)
def test_a_pipeline_that_reads_references_otherwise_takes_none_here(pipeline):
    said = "no reference pictures here, though flux2 does: it is made for "
    with pytest.raises(BadRecipe, match=said) as refused:
        check_references(FAMILIES["flux2"], {"_class_name": pipeline})
    why = SAME_NETWORK.get(str(pipeline), "as Flux2KleinPipeline or Flux2Pipeline does")
    assert str(refused.value).endswith(why)


@pytest.mark.parametrize(
    "pipeline",
    [
        "Flux2Pipeline",
        "Flux2KleinPipeline",
        "Flux2ModularPipeline",
        "Flux2KleinModularPipeline",
        "Flux2KleinBaseModularPipeline",
    ],
)
def test_a_pipeline_that_reads_references_as_the_family_takes_them(pipeline):
    check_references(FAMILIES["flux2"], {"_class_name": pipeline})
    check_references(FAMILIES["flux2"], {})


@pytest.mark.parametrize("flow", ["latent", "pixel"])
def test_references_are_never_ignored(flow):
    """A network that cannot read them is not run."""
    pair = lifted_pair("sd3")
    latents, pictures = clean_pairs(pair)
    z = torch.zeros(2, 24, pair.geometry.d).double()
    level = torch.ones(2).double()
    with pytest.raises(BadRecipe, match="sd3 takes no reference pictures: asymlift knows of"):
        if flow == "latent":
            pair.latent(z, level, with_references(pair.text, latents), pair.grid)
        else:
            x_t, text = z @ pair.A.T, with_references(pair.text, pictures)
            pair.pixel.predict(x_t, level, text, pair.grid)


def test_omnigen_says_what_it_would_need():
    with pytest.raises(BadRecipe, match=r"omnigen takes .*stand inside its prompt"):
        reference_rule(FAMILIES["omnigen"])
