"""The straight path between image and noise."""

import torch
from torch.testing import assert_close

from asymlift.maths.flow import clean_from_velocity, low_rank_image, mix


def test_the_true_velocity_points_back_at_the_image():
    x0, eps = torch.randn(2, 3, 5, 12, dtype=torch.float64)
    sigma = torch.tensor([0.1, 0.5, 1.0], dtype=torch.float64)
    x_t = mix(x0, eps, sigma)

    assert_close(clean_from_velocity(x_t, eps - x0, sigma), x0)
    assert_close(x_t[1], 0.5 * x0[1] + 0.5 * eps[1])
    assert_close(x_t[2], eps[2])


def test_a_low_rank_image_is_its_latent_scaled_and_seen_through_the_basis():
    A = torch.linalg.qr(torch.randn(12, 4, dtype=torch.float64))[0]
    z0 = torch.randn(2, 5, 4, dtype=torch.float64)

    assert_close(low_rank_image(z0, A, 1.7) @ A, 1.7 * z0)
