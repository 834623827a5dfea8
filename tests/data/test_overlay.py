from dataclasses import replace

import numpy as np
import pytest
import torch

from asymlift.data.buckets import Fit
from asymlift.data.catalog import Catalog, listed
from asymlift.data.overlay import caches_of, overlaid
from asymlift.data.packing import pack
from asymlift.data.pictures import encode_png
from asymlift.data.reader import Reader
from asymlift.data.records import LATENT, TEXT, Sample
from asymlift.data.writer import Packed, write_shard
from asymlift.errors import BadData
from asymlift.recipe import DataSection
from asymlift.stages.open_data import open_data

FIT = Fit(sides=(32,), patch=8)
OLD, NEW = {"vae": "old", "latents": "float32", "text": "float32"}, {"vae": "new"}


def samples(keys, value=0.0):
    for key in keys:
        image = torch.full((3, 32, 32), int(key) % 256, dtype=torch.uint8)
        latent, text = torch.full((4, 8, 8), value), {"words": torch.full((2, 3), value)}
        yield Sample(key, image, f"caption {key}", latent=latent, text=text)


def cached(keys, value, suffix=LATENT, name="latent"):
    for key in keys:
        yield Packed(key, {suffix: pack({name: torch.full((4, 8, 8), value)}, "float32")}, 32, 32)


KEYS = [f"{number:03d}" for number in range(10)]


@pytest.fixture
def shards(tmp_path):
    """Two shards of five; their caches in one shard, in another order."""
    first = write_shard(tmp_path / "a.tar", samples(KEYS[:5]), made=OLD)
    second = write_shard(tmp_path / "b.tar", samples(KEYS[5:]), made=OLD)
    newer = write_shard(tmp_path / "cache" / "0.tar", cached(KEYS[::-1], 7.0), made=NEW)
    return first, second, newer


def test_samples_take_the_newer_part_and_keep_the_others(shards):
    *old, newer = shards
    catalog = Catalog([overlaid(table, caches_of([newer])) for table in old], FIT)
    assert catalog.made == {"vae": "new", "latents": "float32", "text": "float32"}
    assert len(catalog) == 10 and not catalog.faults
    for record in catalog:
        sample = Reader().read(record)
        assert sample.latent.eq(7).all() and sample.text["words"].eq(0).all()
        assert sample.caption == f"caption {record.key}"
        assert sample.image.eq(int(record.key)).all()


def test_a_sample_that_is_not_in_the_cache_is_left_out_and_counted(tmp_path, shards):
    newer = write_shard(tmp_path / "cache" / "1.tar", cached(KEYS[:3], 7.0), made=NEW)
    catalog = Catalog([overlaid(shards[0], caches_of([newer]))], FIT)
    assert list(catalog.keys()) == KEYS[:3]
    (fault,) = catalog.faults
    assert str(fault).endswith("a.tar: not in data.cache (2 samples, the first is 003)")
    assert fault.count == 2 and catalog.num_listed == 5


def test_what_only_the_cache_has_counts_as_there(tmp_path, shards):
    image = {".png": encode_png(torch.zeros(3, 32, 32, dtype=torch.uint8))}
    bare = write_shard(tmp_path / "c.tar", [Packed(k, image, 32, 32) for k in KEYS], made={})
    source = overlaid(bare, caches_of([shards[2]]))
    assert source.has(LATENT).all() and not source.has(TEXT).any()
    assert not bare.has(LATENT).any()


def test_pictures_in_folders_can_have_a_cache(tmp_path, shards):
    for key in KEYS:
        (tmp_path / "pictures").mkdir(exist_ok=True)
        picture = encode_png(torch.full((3, 32, 32), int(key), dtype=torch.uint8))
        (tmp_path / "pictures" / f"{key}.png").write_bytes(picture)
    (tmp_path / "pictures" / "extra.png").write_bytes(picture)
    catalog = Catalog([overlaid(listed(tmp_path / "pictures"), caches_of([shards[2]]))], FIT)
    assert list(catalog.keys()) == KEYS
    assert Reader().read(catalog[4]).latent.eq(7).all()
    assert catalog.faults[0].detail == "1 samples, the first is extra"


def test_caches_are_made_by_prepare_and_hold_no_pictures(tmp_path, shards):
    with pytest.raises(BadData, match=r"b\.tar holds pictures"):
        caches_of([shards[1]])
    foreign = write_shard(tmp_path / "f.tar", cached(KEYS, 1.0))
    with pytest.raises(BadData, match=r"f\.tar does not say what it was made with"):
        caches_of([foreign])
    other = write_shard(tmp_path / "o.tar", cached(KEYS, 1.0), made={"vae": "third"})
    with pytest.raises(BadData, match=r"(?s)vae third.*new"):
        caches_of([shards[2], other])


def test_a_cache_is_not_taken_for_training_data(tmp_path, shards):
    catalog = Catalog([shards[2]], FIT)
    assert len(catalog) == 0 and catalog.num_lost == 10
    said = str(catalog.nothing_left("cache"))
    assert said.startswith("cache: holds latents or embeddings without pictures; data.cache is")


def test_two_keys_with_one_hash_are_told_apart(shards):
    caches = caches_of([shards[2]])
    same = replace(caches, hashes=np.sort(np.full(10, hash("other"))))
    assert (same.find(["other"]) == -1).all()


def test_a_recipe_names_its_cache(tmp_path, shards):
    section = {"train": [str(tmp_path / "a.tar"), str(tmp_path / "b.tar")]}
    data = DataSection(**section, cache=str(tmp_path / "cache"))
    catalog = open_data(data.train, data, patch=8)
    assert all(Reader().latent(record).eq(7).all() for record in catalog)
    nowhere = DataSection(**section, cache=str(tmp_path / "pictures.csv"))
    with pytest.raises(BadData, match="is no shard, nor a folder of shards"):
        open_data(nowhere.train, nowhere, patch=8)
