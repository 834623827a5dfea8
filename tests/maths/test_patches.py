import pytest
import torch
from torch.testing import assert_close

from asymlift.maths.patches import image_to_tokens, order_index, tokens_to_image

ORDERS = ["c p q", "p q c"]


def test_a_token_is_read_channel_by_channel_then_row_by_row():
    image, p = torch.randn(2, 3, 8, 12), 4

    tokens = image_to_tokens(image, p)

    assert tokens.shape == (2, 6, 48)
    for cell in range(6):
        top, left = cell // 3 * p, cell % 3 * p  # the grid has 2 rows of 3
        patch = image[:, :, top : top + p, left : left + p]
        assert torch.equal(tokens[:, cell], patch.reshape(2, -1))


def test_channel_last_order_reads_pixel_by_pixel():
    image = torch.randn(1, 3, 4, 4)
    assert torch.equal(image_to_tokens(image, 4, "p q c")[0, 0], image[0].permute(1, 2, 0).ravel())


@pytest.mark.parametrize("order", ORDERS)
def test_tokens_go_back_to_the_same_image(order):
    image = torch.randn(2, 5, 6, 10)
    tokens = image_to_tokens(image, 2, order)
    assert torch.equal(tokens_to_image(tokens, 2, (3, 5), order), image)


@pytest.mark.parametrize("order", ORDERS)
def test_order_index_turns_model_vectors_into_canonical_ones(order):
    image = torch.randn(1, 5, 3, 3)
    model, canonical = image_to_tokens(image, 3, order), image_to_tokens(image, 3)
    assert torch.equal(model[..., order_index(order, 5, 3)], canonical)


def test_pixels_reread_as_latents_keep_the_token_and_its_place():
    """A 16-pixel patch of RGB is a 2 x 2 patch of 192 channels: same vector, same grid cell."""
    tokens = image_to_tokens(torch.randn(2, 3, 32, 48), 16)

    latent_map = tokens_to_image(tokens, 2, (2, 3))

    assert latent_map.shape == (2, 192, 4, 6)
    assert_close(image_to_tokens(latent_map, 2), tokens, rtol=0, atol=0)
