import math

import pytest
import torch
from torch import Tensor
from torch.testing import assert_close

from asymlift.maths.color import ColorCode, oklab_to_rgb, rgb_to_oklab

OKLAB = ColorCode("oklab", (0.56, 0.0, 0.01), 0.16)
RGB = ColorCode("rgb", (0.4, 0.5, 0.6), 0.25)


def pixel(*rgb: float) -> Tensor:
    return torch.tensor(rgb, dtype=torch.float64).view(3, 1, 1)


def cube(steps: int) -> Tensor:
    """Every colour of a grid over [0, 1]^3, with the corners: (3, steps^2, steps)."""
    axis = torch.linspace(0, 1, steps)
    return torch.stack(torch.meshgrid(axis, axis, axis, indexing="ij")).flatten(1, 2)


@pytest.mark.parametrize(
    ("rgb", "lab"),
    [
        ((1, 1, 1), (1, 0, 0)),
        ((0, 0, 0), (0, 0, 0)),
        ((1, 0, 0), (0.62796, 0.22486, 0.12585)),
        ((0, 1, 0), (0.86644, -0.23389, 0.17950)),
        ((0, 0, 1), (0.45201, -0.03246, -0.31153)),
    ],
)
def test_oklab_has_the_published_values(rgb, lab):
    assert_close(rgb_to_oklab(pixel(*rgb)), pixel(*lab), rtol=0, atol=6e-6)


@pytest.mark.parametrize("v", [0.0, 0.01, 0.04, 0.0404, 0.0405, 0.041, 0.2, 0.5, 1.0])
def test_grey_is_the_cube_root_of_the_srgb_curve(v):
    linear = v / 12.92 if v <= 0.04045 else ((v + 0.055) / 1.055) ** 2.4
    expected = pixel(linear ** (1 / 3), 0, 0)
    assert_close(rgb_to_oklab(pixel(v, v, v)), expected, rtol=0, atol=6e-8)  # the matrices' digits


@pytest.mark.parametrize("linear", [0.0, 0.001, 0.003, 0.00312, 0.00314, 0.004, 0.5, 1.0])
def test_decoded_grey_follows_the_inverse_curve(linear):
    v = 12.92 * linear if linear <= 0.0031308 else 1.055 * linear ** (1 / 2.4) - 0.055
    lightness = linear ** (1 / 3)
    assert_close(oklab_to_rgb(pixel(lightness, 0, 0)), pixel(v, v, v), rtol=0, atol=2e-7)


def test_every_srgb_color_survives_the_round_trip():
    rgb = cube(12)
    assert_close(oklab_to_rgb(rgb_to_oklab(rgb)), rgb, rtol=0, atol=3e-8)  # at the curve's kink
    inside = (rgb > 0.05).all(0).expand_as(rgb)
    assert_close(oklab_to_rgb(rgb_to_oklab(rgb))[inside], rgb[inside], rtol=0, atol=1e-13)


def test_float32_colors_survive_the_round_trip_to_an_eighth_of_an_8_bit_step():
    rgb = cube(12).float()
    assert_close(oklab_to_rgb(rgb_to_oklab(rgb)), rgb, rtol=0, atol=1 / 255 / 8)


def test_colors_outside_srgb_are_clamped_in_linear_light():
    lab = rgb_to_oklab(pixel(0.2, 0.9, 0.5)) + pixel(0.1, -0.3, 0.3)
    assert_close(oklab_to_rgb(lab), pixel(0, 1, 0))
    assert_close(oklab_to_rgb(pixel(2, 0, 0)), pixel(1, 1, 1))


def test_light_below_zero_counts_as_black():
    rgb = pixel(-0.5, -0.5, -0.5).requires_grad_()
    lab = rgb_to_oklab(rgb)
    lab.sum().backward()
    assert torch.equal(lab, pixel(0, 0, 0))
    assert torch.equal(rgb.grad, pixel(0, 0, 0))
    assert rgb_to_oklab(pixel(1, -0.5, -0.5)).isfinite().all()


def test_decoding_agrees_with_the_published_decoder():
    """Ottosson prints the inverse matrices; ours are inverted, and agree to his digits."""
    lab = torch.tensor([0.62, 0.03, -0.05]) + 0.02 * torch.randn(50, 3)
    L, a, b = lab.unbind(1)
    long = (L + 0.3963377774 * a + 0.2158037573 * b) ** 3
    medium = (L - 0.1055613458 * a - 0.0638541728 * b) ** 3
    short = (L - 0.0894841775 * a - 1.2914855480 * b) ** 3
    linear = torch.stack(
        [
            4.0767416621 * long - 3.3077115913 * medium + 0.2309699292 * short,
            -1.2684380046 * long + 2.6097574011 * medium - 0.3413193965 * short,
            -0.0041960863 * long - 0.7034186147 * medium + 1.7076147010 * short,
        ]
    )
    assert linear.min() > 0.0031308
    assert linear.max() < 1
    expected = 1.055 * linear ** (1 / 2.4) - 0.055

    assert_close(oklab_to_rgb(lab.T.unsqueeze(1))[:, 0], expected, rtol=0, atol=1e-7)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("code", [OKLAB, RGB])
def test_gradients_are_finite_at_exact_black_white_and_the_primaries(code, dtype):
    image = (cube(2) * 2 - 1).to(dtype).requires_grad_()
    code.encode(image).sum().backward()
    assert image.grad.isfinite().all()

    x = code.encode(image).detach().requires_grad_()
    code.decode(x).sum().backward()
    assert x.grad.isfinite().all()

    black = torch.zeros(3, 1, 1, dtype=dtype).requires_grad_()
    oklab_to_rgb(black).sum().backward()
    assert black.grad.isfinite().all()


def test_the_gradient_at_black_reaches_what_is_not_black():
    """One black pixel used to poison its whole picture: NaN + anything."""
    rgb = torch.stack([torch.zeros(3), torch.full((3,), 0.5)], dim=1).view(3, 1, 2)
    rgb.requires_grad_()
    assert torch.autograd.gradcheck(lambda v: rgb_to_oklab(v)[..., 1], rgb)
    lab = rgb_to_oklab(rgb).detach().requires_grad_()
    assert torch.autograd.gradcheck(lambda v: oklab_to_rgb(v)[..., 1], lab)


@pytest.mark.parametrize("code", [OKLAB, RGB])
def test_codes_decode_what_they_encode(code):
    image = cube(6) * 2 - 1
    assert_close(code.decode(code.encode(image)), image, rtol=0, atol=1e-7)


def test_a_code_centres_and_scales_the_native_values():
    image = torch.rand(2, 3, 4, 4) * 2 - 1
    rgb, oklab = RGB.encode(image), OKLAB.encode(image)
    for channel in range(3):
        native = (image[:, channel] + 1) / 2
        assert_close(rgb[:, channel], (native - RGB.mean[channel]) / 0.25)
        native = rgb_to_oklab((image + 1) / 2)[:, channel]
        assert_close(oklab[:, channel], (native - OKLAB.mean[channel]) / 0.16)


def test_rgb_centred_on_half_is_the_image_itself():
    image = torch.randn(2, 3, 4, 4)  # out of range too: only Oklab clamps
    code = ColorCode("rgb", (0.5, 0.5, 0.5), 0.5)
    assert_close(code.encode(image), image)
    assert_close(code.decode(image), image)


@pytest.mark.parametrize("shape", [(3, 2, 4), (5, 3, 2, 4), (2, 5, 3, 2, 4)])
def test_colors_convert_under_any_batch_shape(shape):
    image = torch.rand(shape) * 2 - 1
    x = OKLAB.encode(image)
    assert x.shape == shape
    single = image.reshape(-1, 3, 2, 4)[-1]
    assert_close(x.reshape(-1, 3, 2, 4)[-1], OKLAB.encode(single))
    assert OKLAB.encode(image.float()).dtype == torch.float32


def test_lightness_is_the_first_oklab_channel():
    lightness = rgb_to_oklab(torch.linspace(0, 1, 9).expand(3, 1, 9))[0, 0]
    assert (lightness.diff() > 0).all()
    assert math.isclose(float(lightness[-1]), 1, abs_tol=1e-7)
