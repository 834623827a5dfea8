"""A batch follows the slot and the sample, not the rank, the split or its neighbours."""

from functools import partial

import pytest
import torch
from torch import Tensor

from asymlift.data.captions import is_dropped
from asymlift.data.order import derive
from asymlift.data.pictures import image_to_float
from asymlift.data.records import Sample
from asymlift.families import FAMILIES
from asymlift.maths.color import ColorCode
from asymlift.maths.patches import image_to_tokens
from asymlift.model.batch import BatchMaker, Place
from asymlift.model.noise_levels import NoiseLevels
from asymlift.model.training_step import Batch
from asymlift.recipe import TimeSection
from tests.families.case import CHANNELS, WORDS, case_of
from tests.tiny import GRID, tiny_geometry, tiny_vae

COLOR = ColorCode("oklab", (0.56, 0.0, 0.01), 0.16)
HEIGHT, WIDTH = 8 * GRID[0], 8 * GRID[1]
NUM = GRID[0] * GRID[1]
CPU = torch.device("cpu")


def sample(number: int, *, cached: bool = True) -> Sample:
    g = torch.Generator().manual_seed(number)
    return Sample(
        f"{number:06d}",
        torch.randint(0, 256, (3, HEIGHT, WIDTH), generator=g, dtype=torch.uint8),
        f"caption {number}",
        {},
        torch.randn(CHANNELS, 2 * GRID[0], 2 * GRID[1], generator=g) if cached else None,
        {"encoder_hidden_states": torch.randn(5, WORDS, generator=g)},
    )


def embedding(name: str, number: int) -> dict[str, Tensor]:
    """Of a prompt, at random."""
    g = torch.Generator().manual_seed(number)
    return case_of(name).sample(partial(torch.randn, generator=g), 0)


NULL = {"encoder_hidden_states": torch.full((5, WORDS), -7.0)}


def maker(name: str = "flux2", *, dropout: float = 0.0, null_text=NULL, **encoders) -> BatchMaker:
    encoders = {"encode_latents": None, "encode_captions": None} | encoders
    return BatchMaker(
        FAMILIES[name],
        tiny_geometry(name),
        COLOR,
        CPU,
        null_text=null_text,
        caption_dropout=dropout,
        draw_sigma=NoiseLevels(TimeSection(), 8),
        **encoders,
    )


def rows(batch: Batch) -> list[dict[str, Tensor]]:
    """Everything a batch says about each of its slots."""
    words = batch.text["encoder_hidden_states"]
    names = ("x0", "z0", "eps", "sigma", "weight")
    return [
        {**{name: getattr(batch, name)[i] for name in names}, "text": words[i]}
        for i in range(len(batch.x0))
    ]


def assert_same(one: dict[str, Tensor], other: dict[str, Tensor]) -> None:
    for name, value in one.items():
        assert torch.equal(value, other[name]), name


def test_a_slot_holds_its_sample_in_the_models_spaces():
    good = sample(1)
    batch = maker().make([good], Place(0, 0, [40]), GRID)
    image = COLOR.encode(image_to_float(good.image))[None]
    assert torch.equal(batch.x0, image_to_tokens(image, 8))
    assert torch.equal(batch.z0, image_to_tokens(good.latent[None], 2))
    assert torch.equal(batch.text["encoder_hidden_states"][0], good.text["encoder_hidden_states"])
    assert batch.weight.tolist() == [1.0] and batch.grid == GRID
    for value in (batch.x0, batch.z0, batch.eps, batch.sigma, batch.weight):
        assert value.dtype == torch.float32


def test_noise_and_noise_level_are_drawn_from_seed_and_slot():
    place = Place(3, 9, [70, 71])
    batch = maker().make([sample(1), sample(2)], place, GRID)
    for position, slot in enumerate((70, 71)):
        g = torch.Generator().manual_seed(derive(3, "noise", slot))
        assert torch.equal(batch.eps[position], torch.randn(NUM, 192, generator=g))
    assert torch.equal(batch.sigma, NoiseLevels(TimeSection(), 8)(place, (HEIGHT, WIDTH)))


@pytest.mark.parametrize("dropout", [0.0, 0.5])
def test_another_split_into_micro_batches_gives_the_same_slots(dropout):
    samples = [sample(i) for i in range(6)]
    make = maker(dropout=dropout).make
    slots = [12, 13, 14, 15, 16, 17]
    whole = rows(make(samples, Place(1, 2, slots), GRID))
    for size in (1, 2, 3):
        starts = range(0, 6, size)
        split = [
            row
            for a in starts
            for row in rows(make(samples[a : a + size], Place(1, 2, slots[a : a + size]), GRID))
        ]
        for one, other in zip(whole, split, strict=True):
            assert_same(one, other)
    swapped = rows(make(samples[::-1], Place(1, 2, slots[::-1]), GRID))
    for one, other in zip(whole, swapped[::-1], strict=True):
        assert_same(one, other)


def test_bad_neighbours_change_nothing():
    samples = [sample(i, cached=i % 2 == 0) for i in range(4)]
    make = maker(
        dropout=0.5, encode_latents=lambda images: images[:, :, ::4, ::4].repeat(1, 2, 1, 1)[:, :4]
    ).make
    whole = rows(make(samples, Place(0, 0, range(4)), GRID))
    for missing in ({0}, {1, 2}, {0, 1, 3}):
        holed = rows(
            make(
                [None if i in missing else s for i, s in enumerate(samples)],
                Place(0, 0, range(4)),
                GRID,
            )
        )
        for i in range(4):
            if i in missing:
                assert holed[i]["weight"] == 0
                assert not holed[i]["x0"].any() and not holed[i]["z0"].any()
                assert torch.equal(holed[i]["text"], NULL["encoder_hidden_states"])
                assert torch.equal(holed[i]["eps"], whole[i]["eps"])
            else:
                assert_same(whole[i], holed[i])


@pytest.mark.parametrize("name", FAMILIES)
def test_a_batch_of_empty_slots_has_the_shapes_of_any_other(name):
    case, null = case_of(name), embedding(name, 99)
    batch = maker(name, null_text=null).make([None, None], Place(0, 0, [4, 5]), case.grid)
    num = case.grid[0] * case.grid[1]
    assert batch.x0.shape == batch.eps.shape == (2, num, case.sizes.D)
    assert batch.z0.shape == (2, num, case.sizes.d)
    assert batch.weight.tolist() == [0.0, 0.0] and batch.sigma.shape == (2,)
    for key, value in null.items():
        given = batch.text[key]
        assert len(given) == 2
        for item in given:
            assert torch.equal(item, value)


def test_a_caption_is_dropped_by_seed_epoch_and_key_alone():
    """Not by the slot, where the same sample stands elsewhere in every epoch."""
    samples = [sample(i) for i in range(40)]

    def dropped(seed: int, epoch: int, first: int, share: float = 0.3) -> list[bool]:
        place = Place(seed, epoch, range(first, first + 40))
        words = maker(dropout=share).make(samples, place, GRID).text["encoder_hidden_states"]
        kinds = [bool((w == -7).all()) for w in words]
        for is_null, w, s in zip(kinds, words, samples, strict=True):
            assert is_null or torch.equal(w, s.text["encoder_hidden_states"])
        return kinds

    base = dropped(0, 0, 0)
    assert base == dropped(0, 0, 1000)
    assert base != dropped(0, 1, 0) and base != dropped(1, 0, 0)
    assert 4 <= sum(base) <= 20
    assert not any(dropped(0, 0, 0, 0.0)) and all(dropped(0, 0, 0, 1.0))
    over_epochs = [dropped(0, epoch, 0) for epoch in range(20)]
    assert abs(sum(map(sum, over_epochs)) / 800 - 0.3) < 0.05


def test_captions_encoded_here_are_those_that_are_kept():
    asked: list[list[str]] = []

    def encode(captions: list[str]) -> list[dict[str, Tensor]]:
        asked.append(captions)
        return [
            {"encoder_hidden_states": torch.full((5, WORDS), float(c.split()[1]))} for c in captions
        ]

    samples = [sample(i) for i in range(12)]
    for each in samples:
        each.text = None
    make = maker(dropout=0.4, encode_captions=encode)
    words = make.make(samples, Place(0, 0, range(12)), GRID).text["encoder_hidden_states"]
    kept = [not is_dropped(0.4, 0, 0, s.key) for s in samples]
    assert 0 < sum(kept) < 12
    assert asked == [[s.caption for s, keep in zip(samples, kept, strict=True) if keep]]
    assert words[:, 0, 0].tolist() == [float(i) if keep else -7.0 for i, keep in enumerate(kept)]


@pytest.mark.parametrize("name", FAMILIES)
def test_a_latent_encoded_here_equals_the_cached_one(name):
    """Cached and fresh in one batch, in any order."""
    vae, family = tiny_vae(name), FAMILIES[name]

    def encode(images: Tensor) -> Tensor:
        with torch.no_grad():
            return family.encode_latents(vae, images)

    case, plain = case_of(name), [sample(i, cached=False) for i in range(3)]
    g = torch.Generator().manual_seed(0)
    for i, s in enumerate(plain):
        size = (3, case.height, case.width)
        s.image = torch.randint(0, 256, size, generator=g, dtype=torch.uint8)
        s.text = embedding(name, i)
    null = embedding(name, 99)
    cached = [
        Sample(s.key, s.image, s.caption, s.facts, encode(image_to_float(s.image)[None])[0], s.text)
        for s in plain
    ]
    place = Place(0, 0, range(3))
    expected = maker(name, null_text=null).make(cached, place, case.grid).z0
    make = maker(name, null_text=null, encode_latents=encode).make
    for mixed in ([plain[0], cached[1], plain[2]], [cached[0], plain[1], cached[2]], plain):
        z0 = make(mixed, place, case.grid).z0
        torch.testing.assert_close(z0, expected, rtol=1e-4, atol=1e-4)


def test_a_missing_latent_without_a_vae_is_our_own_mistake():
    with pytest.raises(AssertionError, match="checked before training"):
        maker().make([sample(0, cached=False)], Place(0, 0, [0]), GRID)


def test_cached_embeddings_and_encoded_ones_go_together():
    """Each keeps its place; what is cached is not encoded, whatever dtype it is stored in."""
    asked: list[str] = []

    def encode(captions: list[str]) -> list[dict[str, Tensor]]:
        asked.extend(captions)
        return [{"encoder_hidden_states": torch.full((5, WORDS), 8.0 + len(asked))}]

    samples = [sample(i) for i in range(4)]
    cached = [s.text["encoder_hidden_states"].bfloat16() for s in samples]
    for s, words in zip(samples, cached, strict=True):
        s.text = {"encoder_hidden_states": words}
    samples[2].text = None
    batch = maker(encode_captions=encode).make(samples, Place(0, 0, range(4)), GRID)
    found = batch.text["encoder_hidden_states"]
    assert asked == ["caption 2"]
    assert found.dtype == torch.float32
    for number in (0, 1, 3):
        assert torch.equal(found[number], cached[number].float())
    assert (found[2] == 9).all()


def test_a_missing_embedding_without_an_encoder_is_our_own_mistake():
    bare = sample(0)
    bare.text = None
    with pytest.raises(AssertionError, match="checked before training"):
        maker().make([bare], Place(0, 0, [0]), GRID)


def test_the_encoder_sees_the_picture_that_the_pixels_come_from():
    seen: list[Tensor] = []

    def encode(images: Tensor) -> Tensor:
        seen.append(images)
        return torch.zeros(1, CHANNELS, 2 * GRID[0], 2 * GRID[1])

    plain = sample(5, cached=False)
    batch = maker(encode_latents=encode).make([plain], Place(0, 0, [0]), GRID)
    picture = image_to_float(plain.image)[None]
    assert torch.equal(batch.x0, image_to_tokens(COLOR.encode(picture), 8))
    assert torch.equal(seen[0], picture)


def test_cached_latents_and_texts_may_be_bf16():
    half = sample(1)
    half.latent = half.latent.bfloat16()
    batch = maker().make([half], Place(0, 0, [0]), GRID)
    assert batch.z0.dtype == torch.float32
    assert torch.equal(batch.z0, image_to_tokens(half.latent.float()[None], 2))
