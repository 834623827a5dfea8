import pytest
import torch
from torch import Tensor
from torch.testing import assert_close

from asymlift.maths.color import ColorCode
from asymlift.maths.guidance import Renorm, clamp_denoised, guide, renormalised_guidance
from asymlift.maths.patches import tokens_to_image

SHAPE = (3, 3, 4, 6)
OKLAB = ColorCode("oklab", (0.56, 0.0, 0.01), 0.16)


def inner(a: Tensor, b: Tensor) -> Tensor:
    """One inner product per sample."""
    return (a * b).flatten(1).sum(1)


@pytest.mark.parametrize("orthogonal", [0.0, 1.0])
def test_guidance_of_strength_one_is_the_positive_branch(orthogonal):
    u_pos, u_neg, x0_pos = torch.randn(3, *SHAPE)
    assert torch.equal(guide(u_pos, u_neg, x0_pos, scale=1.0, orthogonal=orthogonal), u_pos)


def test_without_the_orthogonal_part_it_is_classifier_free_guidance():
    u_pos, u_neg, x0_pos = torch.randn(3, *SHAPE)
    u = guide(u_pos, u_neg, x0_pos, scale=4.0, orthogonal=0.0)
    assert_close(u, u_neg + 4 * (u_pos - u_neg))


GRID = (2, 3)  # of tokens, 2 x 2 cells of 3 channels


def renormalised(v_pos: Tensor, v_neg: Tensor, renorm: Renorm, A: Tensor | None = None) -> Tensor:
    return renormalised_guidance(v_pos, v_neg, scale=4.0, renorm=renorm, patch=2, grid=GRID, A=A)


def cells(v: Tensor) -> Tensor:
    return tokens_to_image(v, 2, GRID)


@pytest.mark.parametrize(
    ("of", "view", "dims"),
    [("tokens", lambda v: v, -1), ("pictures", lambda v: v, (1, 2)), ("rows", cells, -1)],
)
def test_renormalised_guidance_turns_what_it_is_of_and_keeps_its_length(of, view, dims):
    v_pos, v_neg = torch.randn(2, 3, 6, 12)
    v, plain = renormalised(v_pos, v_neg, Renorm(of)), v_neg + 4 * (v_pos - v_neg)
    assert_close(view(v).norm(dim=dims), view(v_pos).norm(dim=dims))
    inner = (view(v) * view(plain)).sum(dims)
    assert_close(inner, view(v).norm(dim=dims) * view(plain).norm(dim=dims))


@pytest.mark.parametrize("of", ["tokens", "pictures", "rows"])
def test_renormalisation_that_only_shrinks_makes_nothing_longer(of):
    v_pos = torch.randn(1, 6, 12)
    longer, shorter = -v_pos, 1.1 * v_pos  # as negative branches: 7 and 0.7 times as long
    assert_close(renormalised(v_pos, longer, Renorm(of, only_shrinks=True)), v_pos)
    assert_close(renormalised(v_pos, shorter, Renorm(of, only_shrinks=True)), 0.7 * v_pos)
    assert_close(renormalised(v_pos, shorter, Renorm(of)), v_pos)


@pytest.mark.parametrize("of", ["tokens", "pictures", "rows"])
def test_an_answer_of_nothing_stays_nothing(of):
    nothing = torch.zeros(1, 6, 12)
    assert torch.equal(renormalised(nothing, nothing, Renorm(of)), nothing)


@pytest.mark.parametrize("of", ["tokens", "pictures", "rows"])
def test_renormalised_guidance_of_lifted_tokens_is_that_of_the_latent_ones(of):
    v_pos, v_neg = torch.randn(2, 3, 6, 12)
    A = torch.linalg.qr(torch.randn(48, 12))[0]
    lifted = renormalised(v_pos @ A.T, v_neg @ A.T, Renorm(of), A)
    assert_close(lifted, renormalised(v_pos, v_neg, Renorm(of)) @ A.T)


def test_rows_are_renormalised_inside_the_subspace_and_the_rest_is_guided():
    A = torch.linalg.qr(torch.randn(48, 12))[0]
    u_pos, u_neg = torch.randn(2, 3, 6, 48)
    u, plain = renormalised(u_pos, u_neg, Renorm("rows"), A), u_neg + 4 * (u_pos - u_neg)
    assert_close(u - u @ A @ A.T, plain - plain @ A @ A.T)
    assert_close(u @ A, renormalised(u_pos @ A, u_neg @ A, Renorm("rows")))


@pytest.mark.parametrize("scale", [0.5, 2.3, 4.0])
def test_the_orthogonal_correction_never_moves_a_sample_along_its_image(scale):
    u_pos, u_neg, x0_pos = torch.randn(3, *SHAPE)
    u = guide(u_pos, u_neg, x0_pos, scale=scale, orthogonal=1.0)
    assert_close(inner(u - u_pos, x0_pos), torch.zeros(3), rtol=0, atol=1e-12)


@pytest.mark.parametrize("orthogonal", [0.25, 1.0])
def test_a_share_of_the_component_along_the_image_is_removed_and_nothing_else(orthogonal):
    u_pos, u_neg, x0_pos = torch.randn(3, *SHAPE)
    u = guide(u_pos, u_neg, x0_pos, scale=4.0, orthogonal=orthogonal)
    for sample in range(len(u)):
        b, x0 = 3 * (u_pos - u_neg)[sample], x0_pos[sample]
        b = b - orthogonal * (b * x0).sum() / (x0 * x0).sum() * x0
        assert_close(u[sample], u_pos[sample] + b)


def test_what_is_orthogonal_already_is_kept():
    u_pos, u_neg, x0_pos = torch.zeros(3, 1, 3, 2, 2)
    u_pos[0, 0], x0_pos[0, 1] = 1.0, 1.0
    u = guide(u_pos, u_neg, x0_pos, scale=4.0, orthogonal=1.0)
    assert_close(u, 4 * u_pos)


def test_a_black_image_does_not_blow_the_correction_up():
    """The mean energy of the image is floored: at 1e-6, by default."""
    u_pos, u_neg = torch.randn(2, *SHAPE)
    x0_pos = torch.full(SHAPE, 1e-4)  # mean energy 1e-8
    correction = 3 * (u_pos - u_neg)

    u = guide(u_pos, u_neg, x0_pos, scale=4.0, orthogonal=1.0)

    along = (correction * 1e-4).mean((1, 2, 3), keepdim=True) / 1e-6
    assert_close(u, u_pos + correction - along * 1e-4)


def test_clamping_leaves_images_in_range_alone():
    x0, eps = OKLAB.encode(torch.rand(SHAPE) * 2 - 1), torch.randn(SHAPE)
    sigma = torch.tensor(0.3)
    u, x_t = eps - x0, (1 - sigma) * x0 + sigma * eps

    clamped = clamp_denoised(u, x_t, sigma, decode=OKLAB.decode, encode=OKLAB.encode, floor=1e-4)

    assert_close(clamped, u)


def test_clamping_aims_at_the_nearest_picture():
    """Decode, clamp to [-1, 1], encode: with plain RGB the predicted image itself is clamped."""
    u, x_t, sigma = torch.randn(SHAPE), 2 * torch.randn(SHAPE), torch.tensor(0.3)
    decode, encode = (lambda x: 2 * x), (lambda image: image / 2)

    clamped = clamp_denoised(u, x_t, sigma, decode=decode, encode=encode, floor=1e-4)

    assert_close(x_t - sigma * clamped, (x_t - sigma * u).clamp(-0.5, 0.5))


def test_clamping_divides_by_the_noise_level_but_never_by_less_than_the_floor():
    u, x_t = torch.randn(SHAPE), torch.randn(SHAPE) / 10
    sigma = torch.tensor([0.5, 1e-5, 0.0]).view(3, 1, 1, 1)

    clamped = clamp_denoised(u, x_t, sigma, decode=lambda x: x, encode=lambda x: x, floor=1e-4)

    x0_hat = (x_t - sigma * u).clamp(-1, 1)
    expected = (x_t - x0_hat) / torch.tensor([0.5, 1e-4, 1e-4]).view(3, 1, 1, 1)
    assert_close(clamped, expected)
