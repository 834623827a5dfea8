import pytest
import torch
from torch.testing import assert_close

from asymlift.embedded import IMAGE_SIZE, METRICS_NET, PERCEPTUAL_NET
from asymlift.embedded.metrics import Measure, frechet_distance, radial_spectrum
from asymlift.embedded.nets import FeatureNet, perceptual_map
from asymlift.embedded.scenes import make_scenes


@pytest.fixture(scope="module")
def scenes():
    return make_scenes(range(512), seed=555, size=IMAGE_SIZE)


@pytest.fixture(scope="module")
def measure(scenes):
    return Measure(FeatureNet.load(METRICS_NET), scenes.image)


def test_the_frechet_distance_of_gaussians_is_the_closed_form():
    a = torch.randn(4000, 3, dtype=torch.float64)
    a = (a - a.mean(0)) @ torch.linalg.inv(torch.linalg.cholesky(a.T.cov())).T  # exactly N(0, 1)

    assert_close(frechet_distance(a, 2 * a + 1), 3.0 + 3.0, rtol=1e-9, atol=1e-9)


def test_identical_sets_score_zero(measure, scenes):
    scores = measure(scenes.image, scenes.labels)

    assert abs(scores.frechet) < 1e-2
    assert scores.spectrum_distance < 1e-4
    assert abs(scores.high_frequency - 1) < 1e-4


def test_real_scenes_are_read_almost_without_error(measure, scenes):
    scores = measure(scenes.image, scenes.labels)

    assert scores.accuracy > 0.95
    assert min(scores.accuracy_of.values()) > 0.88


def test_noise_and_blur_score_badly(measure, scenes):
    noise = measure(torch.rand_like(scenes.image), scenes.labels)
    blurred = torch.nn.functional.avg_pool2d(scenes.image, 5, 1, 2)
    blur = measure(blurred, scenes.labels)

    assert noise.frechet > 100 and noise.accuracy < 0.35 and noise.high_frequency > 1.2
    assert blur.frechet > 30 and blur.high_frequency < 0.5


def test_a_spectrum_finds_the_frequency_of_a_wave():
    wave = torch.cos(2 * torch.pi * 5 * torch.arange(32) / 32).expand(1, 3, 32, 32)

    assert radial_spectrum(wave).argmax() == 5


def test_the_perceptual_map_is_zero_for_equal_images(scenes):
    net, image = FeatureNet.load(PERCEPTUAL_NET), scenes.image[:2] * 2 - 1

    assert perceptual_map(net, image, image).shape == (2, 1, IMAGE_SIZE, IMAGE_SIZE)
    assert_close(perceptual_map(net, image, image), torch.zeros_like(image[:, :1]))
    assert perceptual_map(net, image, image.flip(0)).mean() > 0.05


def test_the_perceptual_gradient_reaches_the_first_image_only(scenes):
    net = FeatureNet.load(PERCEPTUAL_NET)
    image, target = (scenes.image[i : i + 2].clone().requires_grad_() for i in (0, 2))

    perceptual_map(net, image, target).sum().backward()

    assert image.grad.abs().sum() > 0
    assert target.grad is None
    assert all(p.grad is None for p in net.parameters())


def test_the_judge_is_not_the_net_of_the_loss():
    assert FeatureNet.load(METRICS_NET).widths != FeatureNet.load(PERCEPTUAL_NET).widths
