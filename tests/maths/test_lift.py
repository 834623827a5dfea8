"""q = 2, so that the flattening order matters. N = 6 tokens on a 2 x 3 grid."""

import pytest
import torch
from torch import Tensor
from torch.nn.functional import conv2d
from torch.testing import assert_close

from asymlift.maths.basis import random_basis
from asymlift.maths.lift import lift_first, lift_last, unlift_first, unlift_last
from asymlift.maths.patches import image_to_tokens, order_index, tokens_to_image

Q, GRID = 2, (2, 3)
C, C_PIXEL, INNER = 4, 12, 7
LATENT, PIXEL = C * Q**2, C_PIXEL * Q**2  # d, D
A = random_basis(PIXEL, LATENT, torch.Generator().manual_seed(0))

orders = pytest.mark.parametrize("order", ["c p q", "p q c"])
extras = pytest.mark.parametrize("extra", [0, 1, 3])


def as_model_input(tokens: Tensor, extra: Tensor, order: str) -> Tensor:
    """Canonical tokens as the network reads them, extra channels after its own."""
    channels = torch.cat([tokens_to_image(tokens, Q, GRID), extra], dim=1)
    return image_to_tokens(channels, Q, order)


@orders
@extras
def test_the_first_map_sees_the_latent_inside_a_pixel_token(order, extra):
    x, mask = torch.randn(3, 6, PIXEL), torch.randn(3, extra, 4, 6)
    weight = torch.randn(INNER, LATENT + extra * Q**2)

    lifted = lift_first(weight, A, patch=Q, order=order)

    latent = as_model_input(x @ A, mask, order) @ weight.T
    assert lifted.shape == (INNER, PIXEL + extra * Q**2)
    assert_close(as_model_input(x, mask, order) @ lifted.T, latent)


@orders  # of the linear maps; a convolution kernel has but one
@extras
def test_a_first_convolution_sees_the_latent_inside_a_pixel_token(order, extra):
    x, mask = torch.randn(3, 6, PIXEL), torch.randn(3, extra, 4, 6)
    weight = torch.randn(INNER, C + extra, Q, Q)

    lifted = lift_first(weight, A, patch=Q, order=order)

    def run(tokens: Tensor, kernel: Tensor) -> Tensor:
        image = torch.cat([tokens_to_image(tokens, Q, GRID), mask], dim=1)
        return conv2d(image, kernel, stride=Q)

    assert lifted.shape == (INNER, C_PIXEL + extra, Q, Q)
    assert_close(run(x, lifted), run(x @ A, weight))


@orders
@extras
def test_the_last_map_writes_the_latent_into_the_subspace(order, extra):
    """So does its bias; learned-variance channels after the latent are dropped."""
    hidden = torch.randn(3, 6, INNER)
    weight, bias = torch.randn(LATENT + extra * Q**2, INNER), torch.randn(LATENT + extra * Q**2)

    lifted_weight = lift_last(weight, A, patch=Q, order=order)
    lifted_bias = lift_last(bias, A, patch=Q, order=order)

    def run(weight: Tensor, bias: Tensor, channels: int) -> Tensor:
        image = tokens_to_image(hidden @ weight.T + bias, Q, GRID, order)
        return image_to_tokens(image[:, :channels], Q)

    assert lifted_weight.shape == (PIXEL, INNER)
    assert lifted_bias.shape == (PIXEL,)
    assert_close(run(lifted_weight, lifted_bias, C_PIXEL), run(weight, bias, C) @ A.T)


def test_for_canonical_models_the_lift_is_two_matrix_products():
    W_in, W_out = torch.randn(INNER, LATENT), torch.randn(LATENT, INNER)
    assert_close(lift_first(W_in, A, patch=Q, order="c p q"), W_in @ A.T)
    assert_close(lift_last(W_out, A, patch=Q, order="c p q"), A @ W_out)


@orders
def test_a_convolution_of_packed_patches_is_their_linear_map(order):
    weight = torch.randn(INNER, LATENT)
    lifted = lift_first(weight[:, :, None, None], A, patch=Q, order=order)
    assert_close(lifted, lift_first(weight, A, patch=Q, order="c p q")[:, :, None, None])


@orders
@extras
def test_unlifting_the_first_map_gives_it_back_with_its_extra_channels(order, extra):
    for weight in (
        torch.randn(INNER, LATENT + extra * Q**2),
        torch.randn(INNER, C + extra, Q, Q),
    ):
        lifted = lift_first(weight, A, patch=Q, order=order)
        assert_close(unlift_first(lifted, A, patch=Q, order=order), weight)


@orders
@extras
def test_unlifting_the_last_map_gives_back_its_latent_channels(order, extra):
    weight = torch.randn(LATENT + extra * Q**2, INNER)
    canonical = weight[order_index(order, C + extra, Q)][:LATENT]
    kept = torch.empty_like(canonical)
    kept[order_index(order, C, Q)] = canonical

    for values, expected in ((weight, kept), (weight[:, 0], kept[:, 0])):
        lifted = lift_last(values, A, patch=Q, order=order)
        assert_close(unlift_last(lifted, A, patch=Q, order=order), expected)
