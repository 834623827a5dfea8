"""Pixels and latents of the same cell stay together, whatever is sampled or resized."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import save

from asymlift.data.buckets import Fit, fit_image
from asymlift.data.catalog import Catalog, open_catalog
from asymlift.data.pairs import PairReader
from asymlift.data.pictures import image_to_float
from asymlift.data.records import LATENT, BadSample, Record, Sample
from asymlift.data.writer import Packed, packed_sample, write_shard
from asymlift.families.base import Geometry
from asymlift.maths.color import ColorCode
from asymlift.maths.patches import image_to_tokens

SIZES = Geometry(vae_factor=4, channels=4, patch=2)
PATCH, LATENT_PATCH = SIZES.pixel_patch, SIZES.patch


def open_samples(path: Path, *samples: Sample | Packed, side: int = 16) -> Catalog:
    write_shard(path / "000000.tar", samples)
    return open_catalog(path / "000000.tar", Fit((side,), PATCH))


def make(path: Path, *samples: Sample | Packed, side: int = 16) -> list[Record]:
    return list(open_samples(path, *samples, side=side))


def with_latent(key: str, image: torch.Tensor, data: bytes) -> Packed:
    """A sample whose latent others have stored."""
    packed = packed_sample(Sample(key, image))
    return replace(packed, members={**packed.members, LATENT: data})


def image_of(height: int, width: int, seed: int = 0) -> torch.Tensor:
    draw = torch.Generator().manual_seed(seed)
    return torch.randint(0, 256, (3, height, width), dtype=torch.uint8, generator=draw)


def latent_of(height: int, width: int) -> torch.Tensor:
    """Each cell holds its own place."""
    return torch.arange(4.0 * height * width).view(4, height, width)


def reader(**options) -> PairReader:
    return PairReader("oklab", SIZES, **options)


def test_tokens_are_raw_colours_and_latents_of_the_same_cell(tmp_path):
    image, latent = image_of(32, 48), latent_of(8, 12)
    (sample,) = make(tmp_path, Sample("a", image, latent=latent))
    x, z = reader().tokens(sample)
    raw = ColorCode("oklab", (0, 0, 0), 1).encode(image_to_float(image)[None])
    assert torch.equal(x, image_to_tokens(raw, PATCH)[0])
    assert torch.equal(z, image_to_tokens(latent[None], LATENT_PATCH)[0])
    assert x.shape == (24, 192) and z.shape == (24, 16)


@pytest.mark.parametrize("number", [1, 7, 23])
def test_sampled_tokens_are_some_of_all_tokens_and_always_the_same(tmp_path, number):
    samples = make(
        tmp_path, *(Sample(k, image_of(32, 48, 1), latent=latent_of(8, 12)) for k in "ab")
    )
    x, z = reader().tokens(samples[0])
    few_x, few_z = reader(tokens_per_image=number).tokens(samples[0])
    assert len(few_z) == number and few_z[:, 0].unique().numel() == number
    places = [int((z == one).all(1).nonzero()) for one in few_z]
    assert torch.equal(few_x, x[places])
    assert torch.equal(few_z, reader(tokens_per_image=number).tokens(samples[0])[1])
    if 1 < number < 20:
        assert not torch.equal(few_z, reader(tokens_per_image=number).tokens(samples[1])[1])


def test_asking_for_more_tokens_than_there_are_gives_all(tmp_path):
    (sample,) = make(tmp_path, Sample("a", image_of(16, 16), latent=latent_of(4, 4)))
    assert len(reader(tokens_per_image=99).tokens(sample)[0]) == 4


def test_an_image_with_a_latent_keeps_its_size_but_for_whole_patches(tmp_path):
    image = image_of(39, 50)
    (sample,) = make(tmp_path, Sample("a", image, latent=latent_of(8, 12)))
    assert torch.equal(reader().pair(sample).image, fit_image(image, 32, 48))


def test_a_missing_latent_is_made_of_the_image_in_its_bucket(tmp_path):
    seen = []

    def encode(image: torch.Tensor) -> torch.Tensor:
        seen.append(image)
        return image.mean(1, keepdim=True)[:, :, ::4, ::4].repeat(1, 4, 1, 1)

    image = image_of(39, 55)
    (sample,) = make(tmp_path, Sample("a", image), side=40)
    pair = reader(encode=encode).pair(sample)
    assert torch.equal(pair.image, fit_image(image, 32, 48))
    assert torch.equal(seen[0], image_to_float(pair.image)[None])
    assert pair.latent.shape == (4, 8, 12)


@pytest.mark.parametrize(
    "size, bucket", [((200, 100), (24, 40)), ((90, 93), (32, 32)), ((32, 32), (32, 32))]
)
def test_a_large_image_is_shrunk_before_it_is_encoded(tmp_path, size, bucket):
    encode = lambda image: torch.zeros(1, 4, image.shape[2] // 4, image.shape[3] // 4)  # noqa: E731
    lying, upright = make(
        tmp_path, Sample("a", image_of(*size[::-1])), Sample("b", image_of(*size)), side=32
    )
    assert reader(encode=encode).pair(lying).image.shape == (3, *bucket)
    x, z = reader(encode=encode).tokens(upright)
    assert len(x) == len(z) == bucket[0] * bucket[1] // PATCH**2
    assert len(reader(encode=encode, tokens_per_image=5).tokens(upright)[0]) == 5


SMALL, NAN = torch.zeros(3, 16, 16, dtype=torch.uint8), float("nan")


@pytest.mark.parametrize(
    "reason, latent",
    [
        ("latent has the wrong number of channels", torch.zeros(16, 4, 4)),
        ("latent has the wrong shape", torch.zeros(4, 5, 4)),
        ("latent has the wrong shape", torch.zeros(4, 0, 4)),
        ("latent has the wrong shape", torch.zeros(4, 4, 12)),
        ("latent has the wrong shape", torch.zeros(4, 2, 2)),  # of the image at half its size
        ("latent has the wrong dtype", torch.zeros(4, 4, 4, dtype=torch.int32)),
        ("latent holds NaN or infinity", torch.full((4, 4, 4), NAN)),
    ],
)
def test_a_latent_that_cannot_belong_is_named(tmp_path, reason, latent):
    (sample,) = make(tmp_path, with_latent("bad", SMALL, save({"latent": latent})))
    with pytest.raises(BadSample, match=r"000000\.tar!bad: " + reason):
        reader().tokens(sample)


def test_without_a_latent_and_without_a_vae_a_sample_is_named(tmp_path):
    (sample,) = make(tmp_path, Sample("bad", SMALL))
    with pytest.raises(BadSample, match=r"000000\.tar!bad: no cached latent"):
        reader().tokens(sample)


def test_an_image_smaller_than_a_patch_never_comes_here(tmp_path):
    tiny = image_of(7, 30)
    catalog = open_samples(
        tmp_path, Sample("a", tiny), Sample("b", tiny, latent=latent_of(1, 7)), Sample("c", SMALL)
    )
    assert [record.key for record in catalog] == ["c"]
    assert [fault.reason for fault in catalog.refused] == ["too elongated"]
    assert [fault.reason for fault in catalog.faults] == ["smaller than one patch"]


def test_a_vae_that_fails_is_named(tmp_path):
    (sample,) = make(tmp_path, Sample("a", image_of(16, 16)))
    failing = reader(encode=lambda image: torch.full((1, 4, 4, 4), NAN))
    with pytest.raises(BadSample, match="the VAE's latent holds NaN"):
        failing.tokens(sample)


def test_the_disagreement_tells_the_right_latent_from_another(tmp_path):
    def encode(image: torch.Tensor) -> torch.Tensor:
        return image[:, :, ::4, ::4].repeat(1, 2, 1, 1)[:, :4]

    images = [image_of(32, 32, seed) for seed in range(2)]
    made = [encode(image_to_float(image)[None])[0] for image in images]
    right, wrong = make(
        tmp_path,
        Sample("right", images[0], latent=made[0].half()),
        Sample("wrong", images[0], latent=made[1]),
    )
    assert reader(encode=encode).disagreement(right) < 1e-5
    assert 1.5 < reader(encode=encode).disagreement(wrong) < 2.5


def test_the_chosen_samples_depend_on_keys_alone(tmp_path):
    samples = [Sample(f"{i:04d}", SMALL) for i in range(50)]
    catalog = open_samples(tmp_path / "one", *samples)
    order = [record.key for record in catalog.lowest_hashes(50)]
    for number, some in enumerate([samples[:20], samples[20:][::-1]]):
        write_shard(tmp_path / "two" / f"{1 - number}.tar", some)
    elsewhere = open_catalog(tmp_path / "two", Fit((16,), PATCH))
    assert [record.key for record in elsewhere.lowest_hashes(50)] == order
    assert sorted(order) == [sample.key for sample in samples] != order
    assert [record.key for record in elsewhere.lowest_hashes(7)] == order[:7]
    # Leaving some out changes nothing in the order of the others.
    fewer = open_samples(tmp_path / "three", *samples[::2])
    assert [record.key for record in fewer.lowest_hashes(99)] == [
        key for key in order if int(key) % 2 == 0
    ]


def test_metadata_of_a_latent_file_does_not_matter(tmp_path):
    data = save({"latent": latent_of(4, 4)}, {"vae": "sha256:0"})
    (sample,) = make(tmp_path, with_latent("a", SMALL, data))
    assert torch.equal(reader().pair(sample).latent, latent_of(4, 4))
