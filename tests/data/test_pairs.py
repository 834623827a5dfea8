"""Pixels and latents of the same cell stay together, whatever is sampled or resized."""

import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import save

from asymlift.data.pairs import PairReader, in_hash_order, read_ahead, same_picture
from asymlift.data.pictures import image_to_float, resize_image
from asymlift.data.shards import BadSample, Sample, SampleIndex, index_shard, write_shard
from asymlift.maths.color import ColorCode
from asymlift.maths.patches import image_to_tokens

PATCH, CHANNELS, LATENT_PATCH = 8, 4, 2  # the VAE shrinks by 4


def make(path: Path, *samples: Sample) -> list[SampleIndex]:
    write_shard(path / "000000.tar", samples)
    return index_shard(path / "000000.tar").samples


def image_of(height: int, width: int, seed: int = 0) -> torch.Tensor:
    draw = torch.Generator().manual_seed(seed)
    return torch.randint(0, 256, (3, height, width), dtype=torch.uint8, generator=draw)


def latent_of(height: int, width: int) -> torch.Tensor:
    """Each cell holds its own place."""
    return torch.arange(4.0 * height * width).view(4, height, width)


def reader(**options) -> PairReader:
    return PairReader("oklab", PATCH, CHANNELS, LATENT_PATCH, **options)


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


def test_an_image_of_another_size_is_brought_to_the_latents(tmp_path):
    image = image_of(68, 102)
    (sample,) = make(tmp_path, Sample("a", image, latent=latent_of(8, 12)))
    assert torch.equal(reader().pair(sample).image, resize_image(image, 32, 48))


def test_a_missing_latent_is_made_from_whole_patches(tmp_path):
    seen = []

    def encode(image: torch.Tensor) -> torch.Tensor:
        seen.append(image)
        return image.mean(1, keepdim=True)[:, :, ::4, ::4].repeat(1, 4, 1, 1)

    image = image_of(39, 50)
    (sample,) = make(tmp_path, Sample("a", image))
    pair = reader(encode=encode).pair(sample)
    assert torch.equal(pair.image, resize_image(image, 32, 48))
    assert torch.equal(seen[0], image_to_float(pair.image)[None])
    assert pair.latent.shape == (4, 8, 12)


def test_a_huge_image_is_shrunk_before_it_is_encoded(tmp_path, monkeypatch):
    monkeypatch.setattr("asymlift.data.pairs.MAX_ENCODED_PIXELS", 40 * 40)
    encode = lambda image: torch.zeros(1, 4, image.shape[2] // 4, image.shape[3] // 4)  # noqa: E731
    (sample,) = make(tmp_path, Sample("a", image_of(200, 100)))
    assert reader(encode=encode).pair(sample).image.shape == (3, 56, 24)


SMALL, NAN = torch.zeros(3, 16, 16, dtype=torch.uint8), float("nan")


@pytest.mark.parametrize(
    "reason, latent",
    [
        ("no cached latent", None),
        ("latent has the wrong number of channels", torch.zeros(16, 4, 4)),
        ("latent has the wrong shape", torch.zeros(4, 5, 4)),
        ("latent has the wrong shape", torch.zeros(4, 0, 4)),
        ("latent has the wrong dtype", torch.zeros(4, 4, 4, dtype=torch.int32)),
        ("latent of another size", torch.zeros(4, 4, 12)),
        ("latent holds NaN or infinity", torch.full((4, 4, 4), NAN)),
    ],
)
def test_a_latent_that_cannot_belong_is_named(tmp_path, reason, latent):
    (sample,) = make(tmp_path, Sample("bad", SMALL, latent=latent))
    with pytest.raises(BadSample, match=r"000000\.tar!bad: " + reason):
        reader().tokens(sample)


def test_an_image_smaller_than_a_patch_and_a_vae_that_fails_are_named(tmp_path):
    tiny, fine = make(tmp_path, Sample("a", image_of(7, 30)), Sample("b", image_of(16, 16)))
    failing = reader(encode=lambda image: torch.full((1, 4, 4, 4), NAN))
    with pytest.raises(BadSample, match="image smaller than a patch"):
        failing.tokens(tiny)
    with pytest.raises(BadSample, match="the VAE's latent holds NaN"):
        failing.tokens(fine)


@pytest.mark.parametrize(
    "size, new_size, same",
    [
        ((512, 512), (512, 512), True),
        ((1000, 750), (992, 736), True),  # cut to whole patches
        ((4000, 3000), (1024, 768), True),
        ((100, 75), (96, 64), True),
        ((512, 512), (512, 768), False),
        ((512, 768), (768, 512), False),
        ((16, 160), (16, 16), False),
        ((1024, 1024), (1024, 960), False),
    ],
)
def test_a_change_of_shape_is_another_picture(size, new_size, same):
    assert same_picture(*size, *new_size, 16) is same
    assert same_picture(*size[::-1], *new_size[::-1], 16) is same


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


def test_the_order_depends_on_keys_alone(tmp_path):
    samples = make(tmp_path, *(Sample(f"{i:04d}", SMALL) for i in range(50)))
    order = in_hash_order(samples)
    elsewhere = [replace(sample, shard=Path("other.tar")) for sample in reversed(samples)]
    assert [s.key for s in in_hash_order(elsewhere)] == [s.key for s in order]
    assert [s.key for s in order] != sorted(s.key for s in samples)
    # Leaving some out changes nothing in the order of the others.
    assert in_hash_order(samples[::2]) == [s for s in order if s in samples[::2]]


@pytest.mark.parametrize("workers", [0, 1, 4])
def test_reading_ahead_keeps_the_order_and_stays_near(workers):
    begun = []

    def read(item: int) -> int:
        begun.append(item)
        time.sleep(0.001 * (item % 3))
        return item * item

    results = read_ahead(read, range(40), workers)
    for expected in range(10):
        assert next(results) == expected**2
    assert len(begun) <= 10 + 2 * workers + 1
    assert list(results) == [item**2 for item in range(10, 40)]


def test_reading_ahead_stops_with_its_reader():
    def read(item: int) -> int:
        if item == 3:
            raise ValueError("three")
        return item

    with pytest.raises(ValueError, match="three"):
        list(read_ahead(read, range(1000), 2))
    results = read_ahead(read, range(3), 2)
    next(results)
    results.close()


def test_metadata_of_a_latent_file_does_not_matter(tmp_path):
    members = {".latent.safetensors": save({"latent": latent_of(4, 4)}, {"vae": "sha256:0"})}
    from asymlift.data.shards import pack

    key, packed = pack(Sample("a", SMALL))
    write_shard(tmp_path / "000000.tar", [(key, {**packed, **members})])
    (sample,) = index_shard(tmp_path / "000000.tar").samples
    assert torch.equal(reader().pair(sample).latent, latent_of(4, 4))
