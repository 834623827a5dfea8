"""Samples of a shard: which pictures and captions are encoded together, and how often."""

import pytest
import torch

from asymlift.data.buckets import Fit
from asymlift.data.catalog import listed
from asymlift.data.packing import unpack
from asymlift.data.pictures import image_to_float
from asymlift.data.reader import Reader
from asymlift.data.records import BadSample
from asymlift.families import FAMILIES
from asymlift.recipe import PrepareSection
from asymlift.stages.prepare.shard import CHUNK, ShardMaker, TextCache
from tests.stages.prepare.small_prepare import draw, encoded, image_in, make_folder
from tests.tiny import KINDS, tiny_pipeline, tiny_vae


class Encoders:
    """Say what they are asked, and answer with a mean or with bytes."""

    def __init__(self):
        self.images, self.prompts = [], []

    def latents(self, images):
        self.images.append(tuple(images.shape))
        return images.mean((2, 3), keepdim=True)

    def texts(self, prompts):
        self.prompts.append(list(prompts))
        return [{"length": torch.tensor([float(len(prompt))])} for prompt in prompts]


def maker(encoders, *, workers=0, **settings):
    section = PrepareSection(source="s", out="o", **{"image": "png", "batch": 4, **settings})
    return ShardMaker(
        section,
        Fit((32,), 8),
        Reader(),
        as_stored=False,
        encode_latents=encoders.latents,
        encode_texts=encoders.texts,
        workers=workers,
    )


def records(folder):
    return listed(folder, measure=False).records


def samples(of, where):
    return list(of.samples(where, lambda fault: pytest.fail(str(fault))))


def test_pictures_of_one_size_go_through_the_encoder_together(tmp_path):
    where = records(make_folder(tmp_path, 20))
    encoders = Encoders()
    packed = samples(maker(encoders), where)
    sizes = [(height, width) for _, _, height, width in encoders.images]
    assert len(set(sizes)) > 1 and sizes == sorted(sizes)  # no size is left and taken up again
    assert max(shape[0] for shape in encoders.images) == 4
    assert sum(shape[0] for shape in encoders.images) == 20
    assert [sample.key for sample in packed] == [record.key for record in where]
    for sample in packed:  # each got its own latent back
        mean = image_to_float(image_in(sample.members)).mean((1, 2))
        latent = unpack(sample.members[".latent.safetensors"])["latent"].flatten()
        torch.testing.assert_close(latent.float(), mean, atol=2e-3, rtol=0)


def test_a_caption_is_encoded_once_and_always_in_a_batch_of_one_size(tmp_path):
    where = records(make_folder(tmp_path, CHUNK + 20))
    encoders = Encoders()
    of = maker(encoders)
    packed = samples(of, where)
    asked = [prompt for batch in encoders.prompts for prompt in batch if prompt]
    assert sorted(set(asked)) == sorted(asked)
    assert {len(batch) for batch in encoders.prompts} == {4}
    for sample in packed:
        length = unpack(sample.members[".text.safetensors"])["length"]
        assert length.item() == len(sample.members[".txt"])
    assert samples(of, where) == packed  # now all from the cache
    assert len(asked) == len([p for batch in encoders.prompts for p in batch if p])


@pytest.mark.parametrize("name", KINDS)
def test_the_bits_of_an_embedding_do_not_depend_on_its_company(name):
    """What is asked for together depends on the cache; the shape never does."""
    pipeline, prompts = tiny_pipeline(name), ["a bee", "a", "many words here", "x y z"]
    alone = {}
    for prompt in prompts:
        alone[prompt] = FAMILIES[name].encode_prompt(pipeline, [prompt, "", "", ""], 12)[0]
    for shift in range(4):
        company = prompts[shift:] + prompts[:shift]
        for prompt, found in zip(
            company, FAMILIES[name].encode_prompt(pipeline, company, 12), strict=True
        ):
            assert found.keys() == alone[prompt].keys()
            assert all(torch.equal(found[key], alone[prompt][key]) for key in found)


@pytest.mark.parametrize("name", KINDS)
@torch.no_grad()
def test_latents_are_the_familys_whatever_is_encoded_with_them(name, tmp_path):
    """Of the real VAE classes; a batch that is not full differs by rounding at most."""
    vae, encoders = tiny_vae(name), Encoders()
    encoders.latents = lambda images: FAMILIES[name].encode_latents(vae, images)
    for sample in samples(maker(encoders, latents="float32"), records(make_folder(tmp_path, 9))):
        image = image_to_float(image_in(sample.members))[None]
        found = unpack(sample.members[".latent.safetensors"])["latent"]
        torch.testing.assert_close(found, FAMILIES[name].encode_latents(vae, image)[0])


@pytest.mark.parametrize("workers", [0, 1, 3])
def test_bad_pictures_are_said_in_order_and_the_others_go_on(workers, tmp_path):
    make_folder(tmp_path, 9)
    for name in ("002.png", "005.png"):
        (tmp_path / name).write_bytes(b"broken")
    bad, done = [], []
    of = maker(Encoders(), workers=workers)
    packed = list(of.samples(records(tmp_path), bad.append, done.append))
    assert [fault.where for fault in bad] == [str(tmp_path / n) for n in ("002.png", "005.png")]
    assert len(packed) == 7 and sum(done) == 9
    assert all(isinstance(fault, BadSample) for fault in bad)


def test_the_original_size_is_kept_from_the_first_preparation_on(tmp_path):
    (tmp_path / "a.png").write_bytes(encoded(draw(0, 50, 40)))
    (picture,) = maker(Encoders()).pictures(records(tmp_path), print)
    assert (picture.facts["original_width"], picture.facts["original_height"]) == (50, 40)
    assert (picture.width, picture.height) == (32, 32)
    assert "captions" not in picture.facts and picture.captions == [""]


def test_without_latents_the_stored_picture_is_not_decoded_again(tmp_path, monkeypatch):
    (tmp_path / "a.png").write_bytes(encoded(draw(0, 50, 40)))
    of = maker(Encoders(), image="jpeg")
    decoded = []
    monkeypatch.setattr(
        "asymlift.stages.prepare.shard.decode_image", lambda data: decoded.append(data) or PICTURE
    )
    list(of.pictures(records(tmp_path), print))
    assert len(decoded) == 1
    of.encode_latents = None
    list(of.pictures(records(tmp_path), print))
    assert len(decoded) == 1


PICTURE = torch.zeros(3, 32, 32, dtype=torch.uint8)


def test_the_cache_of_captions_forgets_the_longest_unused():
    cache = TextCache(10)
    cache.put("a", b"1234")
    cache.put("b", b"1234")
    assert cache.get("a") == b"1234"
    cache.put("c", b"1234")
    assert cache.get("b") is None and cache.get("a") and cache.get("c")
    cache.put("large", b"x" * 99)  # one that is too large stays until the next
    assert cache.size == 99 and cache.get("large")
    cache.put("d", b"1")
    assert cache.size == 1 and cache.get("large") is None
