import math
from itertools import pairwise

import pytest
import torch
from torch import Tensor
from torch.testing import assert_close

from asymlift.maths.basis import principal_angles, procrustes
from asymlift.maths.moments import Moments, color_statistics, merge, normalised
from asymlift.maths.patches import image_to_tokens

PATCH, D, LATENT = 4, 48, 8  # LATENT is d


@pytest.fixture
def tokens() -> tuple[Tensor, Tensor]:
    """Pixel tokens off centre, and latents that follow them: (images, tokens, width)."""
    images = torch.randn(10, 3, 8, 8) * 0.3 + torch.tensor([0.2, 0.5, 0.7]).view(3, 1, 1)
    x = image_to_tokens(images, PATCH)
    return x, 2 * x @ torch.randn(D, LATENT) + torch.randn(10, 4, LATENT)


def of(x: Tensor, z: Tensor) -> Moments:
    return Moments.zero(x.shape[-1], z.shape[-1]).add(x, z, len(x))


def assert_same(a: Moments, b: Moments) -> None:
    for name, value in a.tensors().items():
        assert_close(value, b.tensors()[name], rtol=1e-11, atol=1e-11, msg=name)


def test_moments_are_sums_over_single_tokens(tokens):
    x, z = tokens
    expected = Moments.zero(D, LATENT)
    expected.num_images = 10
    for x_i, z_i in zip(x.flatten(0, 1), z.flatten(0, 1), strict=True):
        expected.num_tokens += 1
        expected.sum_x += x_i
        expected.sum_z += z_i
        expected.gram += torch.outer(x_i, x_i)
        expected.cross += torch.outer(z_i, x_i)
        expected.energy_z += z_i @ z_i

    assert_same(of(x, z), expected)
    assert of(x, z).num_tokens == 40


def test_shards_in_any_order_and_any_split_give_the_same_basis(tokens):
    x, z = tokens
    A, _ = procrustes(of(x, z))
    for cuts in ([0, 3, 10], [0, 1, 2, 9, 10], list(range(11))):
        parts = [of(x[a:b], z[a:b]) for a, b in pairwise(cuts)]
        for order in (parts, parts[::-1]):
            total = Moments.zero(D, LATENT)
            for part in order:
                total = merge(total, part)
            assert_same(total, of(x, z))
            assert principal_angles(procrustes(total)[0], A).max() < 1e-10
            assert_close(procrustes(total)[0], A, rtol=0, atol=1e-10)


def test_merging_commutes_to_the_last_bit_and_changes_neither_half(tokens):
    x, z = tokens
    a, b = of(x[:3], z[:3]), of(x[3:], z[3:])
    ab, ba = merge(a, b), merge(b, a)
    for name, value in ab.tensors().items():
        assert torch.equal(value, ba.tensors()[name])
    assert_same(a, of(x[:3], z[:3]))
    assert_same(b, of(x[3:], z[3:]))


def test_adding_works_in_place_chunk_by_chunk(tokens):
    x, z = tokens
    moments = Moments.zero(D, LATENT)
    for chunk_x, chunk_z in zip(x, z, strict=True):
        assert moments.add(chunk_x, chunk_z, 1) is moments
    assert_same(moments, of(x, z))


def test_float32_tokens_are_summed_in_float64():
    """Small spread on a large mean, where float32 sums lose everything that matters."""
    x = (10 + 1e-3 * torch.randn(500, 3)).float()
    moments = of(x, x[:, :1])
    values = x[:, 0].double().tolist()
    assert moments.gram.dtype == torch.float64
    squares = math.fsum(v * v for v in values)
    assert float(moments.gram[0, 0]) == pytest.approx(squares, rel=1e-14)
    assert float(moments.cross[0, 0]) == pytest.approx(squares, rel=1e-14)
    assert float(moments.energy_z) == pytest.approx(squares, rel=1e-14)
    assert float(moments.sum_x[0]) == pytest.approx(math.fsum(values), rel=1e-14)
    assert float(moments.sum_z[0]) == pytest.approx(math.fsum(values), rel=1e-14)


def test_unpaired_tokens_are_refused(tokens):
    x, z = tokens
    with pytest.raises(AssertionError, match="unpaired"):
        Moments.zero(D, LATENT).add(x, z[:, :3], 10)


def test_normalising_the_sums_is_normalising_every_pixel(tokens):
    x, z = tokens
    mean, std = (0.2, -0.1, 0.7), 0.3
    per_pixel = torch.tensor(mean).view(3, 1).expand(3, PATCH**2).flatten()

    result = normalised(of(x, z), mean, std, PATCH)

    assert_same(result, of((x - per_pixel) / std, z))
    assert torch.equal(result.gram, result.gram.T)


def test_color_statistics_are_those_of_the_pixels():
    images = torch.randn(6, 3, 8, 8) * torch.tensor([0.1, 0.2, 0.4]).view(3, 1, 1)
    images += torch.tensor([0.2, 0.5, 0.7]).view(3, 1, 1)
    x = image_to_tokens(images, PATCH)

    mean, std = color_statistics(of(x, x[..., :0]), PATCH)

    channel_mean = images.mean((0, 2, 3))
    assert mean == pytest.approx(channel_mean.tolist(), rel=1e-12)
    spread = (images - channel_mean.view(3, 1, 1)).square().mean().sqrt()
    assert std == pytest.approx(float(spread), rel=1e-12)


def test_pixels_normalised_by_their_own_statistics_are_centred_with_unit_power(tokens):
    x, z = tokens
    moments = of(x, z)
    mean, std = color_statistics(
        normalised(moments, *color_statistics(moments, PATCH), PATCH), PATCH
    )
    assert mean == pytest.approx((0, 0, 0), abs=1e-13)
    assert std == pytest.approx(1)


def test_moments_without_latents_are_fine(tokens):
    x, _ = tokens
    moments = normalised(of(x, x[..., :0]), (0.1, 0.2, 0.3), 0.5, PATCH)
    assert moments.cross.shape == (0, D)
    assert moments.energy_z == 0


def test_moments_go_through_tensors_unchanged(tokens):
    moments = of(*tokens)
    tensors = moments.tensors()
    assert {str(t.dtype) for t in tensors.values()} == {"torch.int64", "torch.float64"}
    back = Moments.from_tensors(tensors)
    assert (back.num_images, back.num_tokens) == (10, 40)
    assert type(back.num_images) is type(back.num_tokens) is int
    for name, value in tensors.items():
        assert torch.equal(back.tensors()[name], value)
