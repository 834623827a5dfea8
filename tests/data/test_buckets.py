"""A picture gets the bucket that loses least of it, and nothing is ever enlarged unasked."""

import random
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image

from asymlift.data.buckets import (
    Fit,
    Refusal,
    buckets,
    fit_image,
    place,
    places,
    step_of,
    suggestion,
    whole_patches,
)
from asymlift.errors import BadRecipe

FITS = [
    Fit((1024, 512), patch=16),
    Fit((1024, 768, 512), patch=32),
    Fit((1000, 300), patch=16, max_aspect=3.0),
    Fit((64,), patch=2, step=8, max_aspect=1.5),
    Fit((100,), patch=32, max_aspect=1.0),
]
fits = pytest.mark.parametrize("fit", FITS)


def sizes(number: int) -> list[tuple[int, int]]:
    draw = random.Random(0)
    return [(draw.randint(20, 2500), draw.randint(20, 2500)) for _ in range(number)]


def every(fit: Fit) -> list[tuple[int, int, int]]:
    return [(side, *bucket) for side, group in buckets(fit).items() for bucket in group]


def noise(height: int, width: int) -> torch.Tensor:
    """Away from 0 and 255, so that clipping between the two passes plays no part."""
    draw = torch.Generator().manual_seed(0)
    return torch.randint(80, 176, (3, height, width), dtype=torch.uint8, generator=draw)


def off_by(one: torch.Tensor, other: torch.Tensor) -> int:
    return int((one.int() - other.int()).abs().max())


@pytest.mark.parametrize(
    "keys, message",
    [
        ({"sides": ()}, "data.resize.sides is empty"),
        ({"sides": (512, 512)}, "data.resize.sides names a side twice"),
        ({"sides": (8,)}, "data.resize.sides: 8 is smaller than one 16-pixel patch"),
        ({"sides": (512, 32), "step": 64}, "sides: 32 is smaller than data.resize.step 64"),
        ({"step": 24}, "data.resize.step 24 is not a multiple of the 16-pixel patch"),
        ({"step": 0}, "data.resize.step 0 is not a multiple"),
        ({"max_aspect": 0.5}, "data.resize.max_aspect 0.5 is less than 1"),
        ({"max_aspect": float("nan")}, "data.resize.max_aspect nan is less than 1"),
    ],
)
def test_a_recipe_that_gives_no_buckets_is_refused_by_key(keys, message):
    with pytest.raises(BadRecipe, match=message):
        Fit(**{"sides": (512,), "patch": 16} | keys)


@fits
def test_buckets_lie_on_the_grid_within_the_area_and_the_aspect(fit):
    for side, height, width in every(fit):
        assert height % fit.patch == width % fit.patch == 0
        assert height * width <= side**2
        assert max(height, width) <= fit.max_aspect * min(height, width)


@fits
def test_buckets_come_in_both_orientations_once_and_in_order(fit):
    assert list(buckets(fit)) == list(fit.sides) == sorted(fit.sides, reverse=True)
    for group in buckets(fit).values():
        assert {(width, height) for height, width in group} == set(group)
        assert list(group) == sorted(set(group))


def test_the_buckets_of_1024_are_the_familiar_ones():
    tall = [(1024, 1024), (1088, 960), (1152, 896), (1216, 832), (1280, 768), (1344, 768)]
    group = buckets(Fit((1024,), patch=16))[1024]
    assert [bucket for bucket in group if bucket[0] >= bucket[1]] == [*tall, (1408, 704)]
    assert buckets(Fit((100,), patch=32, max_aspect=1.0)) == {100: ((96, 96),)}


@fits
def test_the_square_is_there_and_no_other_bucket_can_grow_both_ways(fit):
    for side, group in buckets(fit).items():
        step = step_of(side, fit)
        assert any(height == width > side - step for height, width in group)
        for height, width in group:
            if height == width:
                continue
            grown = (height + step) * width, height * (width + step)
            assert max(grown) > side**2


@fits
def test_nothing_is_enlarged_and_transposed_pictures_get_transposed_buckets(fit):
    for width, height in sizes(2000):
        bucket, turned = place(width, height, fit), place(height, width, fit)
        if isinstance(bucket, Refusal):
            assert isinstance(turned, Refusal) and turned.reason == bucket.reason
        else:
            assert bucket[0] <= height and bucket[1] <= width
            assert turned == bucket[::-1]


@pytest.mark.parametrize("more", [{}, {"upscale": True}, {"min_side": 300}])
@fits
def test_many_at_once_get_what_each_gets_alone(fit, more):
    fit = replace(fit, **more)
    given = [*sizes(3000), (0, 0), *((w, h) for _, h, w in every(fit))]
    given += [(width + 1, height) for width, height in given] + [(2000, 1000), (2001, 1000)]
    alone = [place(*size, fit) if size[0] else Refusal("", "") for size in given]
    expected = [(0, 0) if isinstance(found, Refusal) else found for found in alone]
    assert list(map(tuple, places(np.array(given), fit).tolist())) == expected


@fits
def test_a_picture_of_a_buckets_size_gets_that_bucket(fit):
    for _, height, width in every(fit):
        assert place(width, height, fit) == (height, width)


def test_the_largest_side_that_a_picture_covers_is_taken():
    fit = Fit((1024, 512), patch=16)
    assert place(4000, 4000, fit) == (1024, 1024)
    assert place(1023, 1023, fit) == (512, 512)
    assert place(1920, 1080, fit) == (768, 1344)
    assert place(1343, 768, fit) == (768, 1280)  # one pixel short of the nearest: its neighbour


@pytest.mark.parametrize("upscale", [False, True])
def test_at_most_a_tenth_is_cropped_away(upscale):
    fit = Fit((1024, 512), patch=16, upscale=upscale)
    for width, height in sizes(5000):
        bucket = place(width, height, fit)
        if not isinstance(bucket, Refusal):
            one, other = width * bucket[0], height * bucket[1]
            assert min(one, other) / max(one, other) > 0.9


def test_refusals_have_few_reasons_and_exact_details():
    fit = Fit((1024, 512), patch=16, min_side=100)
    assert place(300, 200, fit) == Refusal(
        "too small", "300 x 200, the smallest bucket that fits is 608 x 416 (data.resize)"
    )
    assert place(160, 80, fit) == Refusal(
        "too small", "160 x 80, the shorter side must be 100 (data.resize.min_side)"
    )
    assert place(2001, 1000, fit) == Refusal(
        "too elongated", "2001 x 1000, the limit is 2 to 1 (data.resize.max_aspect)"
    )
    assert place(2000, 1000, fit) == (704, 1408)


def test_upscale_enlarges_to_the_smallest_side_and_only_when_it_must():
    fit = Fit((1024, 512), patch=16, upscale=True)
    assert place(300, 200, fit) == (416, 608)
    assert place(700, 700, fit) == (512, 512)
    assert place(1100, 1100, fit) == (1024, 1024)
    assert place(99, 99, replace(fit, min_side=100)).reason == "too small"


def test_a_suggestion_counts_what_it_would_keep():
    small = [(600, 600)] * 99 + [(100, 100)]
    fit = Fit((1024,), patch=16)
    assert suggestion(small, fit) == "data.resize.sides: [1024, 512] would keep 99 of 100"
    assert suggestion([(90, 90)] * 9 + [(9, 9)], Fit((1024,), patch=16)) == (
        "data.resize.sides: [1024, 512, 256, 128, 64] would keep 9 of 10"
    )
    assert suggestion([(9, 9)] * 10, fit) == "data.resize.upscale: true would keep 10 of 10"
    assert suggestion([(1100, 1100)] * 5, replace(fit, min_side=1200)) == (
        "data.resize.min_side: null would keep 5 of 5"
    )


def test_a_suggested_side_is_never_below_the_step():
    fit = Fit((256,), patch=16, step=128)
    assert suggestion([(100, 100)], fit) == "data.resize.upscale: true would keep 1 of 1"


def test_a_picture_that_keeps_its_size_loses_the_part_patch():
    assert whole_patches(50, 33, 16) == (32, 48)
    assert whole_patches(16, 16, 16) == (16, 16)
    assert whole_patches(15, 400, 16) == Refusal(
        "smaller than one patch", "15 x 400, a patch has 16 pixels"
    )


def test_the_right_size_is_left_alone_and_scale_one_only_cuts():
    image = noise(40, 60)
    assert fit_image(image, 40, 60) is image
    assert torch.equal(fit_image(image, 40, 33), image[:, :, 13:46])
    assert torch.equal(fit_image(image, 31, 60), image[:, 4:35])


@pytest.mark.parametrize("width, height, scaled", [(300, 200, (150, 100)), (200, 300, (120, 180))])
def test_fitting_is_scaling_and_then_cutting_the_centre(width, height, scaled):
    image = noise(height, width)
    whole = Image.fromarray(image.permute(1, 2, 0).numpy()).resize(scaled, Image.Resampling.LANCZOS)
    whole = torch.from_numpy(np.array(whole)).permute(2, 0, 1)
    top, left = (scaled[1] - 100) // 2, (scaled[0] - 120) // 2

    cut = fit_image(image, 100, 120)

    assert off_by(cut, whole[:, top : top + 100, left : left + 120]) <= 1


@pytest.mark.parametrize("height, width", [(64, 96), (96, 64), (111, 57), (400, 300)])
def test_fitting_knows_no_left_or_right_no_up_or_down(height, width):
    image = noise(211, 307)
    cut = fit_image(image, height, width)
    assert cut.shape == (3, height, width)
    for axis in (1, 2):
        assert off_by(fit_image(image.flip(axis), height, width).flip(axis), cut) <= 1
    assert off_by(fit_image(image.mT, width, height).mT, cut) <= 1


def test_one_scale_serves_both_sides():
    """The bright square stays a square, in the middle."""
    image = torch.zeros(3, 400, 600, dtype=torch.uint8)
    image[:, 150:250, 250:350] = 255
    bright = fit_image(image, 200, 200)[0] > 127
    inside = torch.zeros(200, 200, dtype=torch.bool)
    inside[75:125, 75:125] = True
    assert torch.equal(bright, inside)


@fits
def test_fitting_never_leaves_the_picture_whatever_the_sizes(fit):
    fit = replace(fit, upscale=True)
    for width, height in sizes(20):
        bucket = place(width, height, fit)
        if not isinstance(bucket, Refusal):
            flat = torch.full((3, height, width), 200, dtype=torch.uint8)
            image = fit_image(flat, *bucket)
            assert image.shape[1:] == bucket
            assert image.min() == image.max() == 200
