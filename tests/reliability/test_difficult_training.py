"""Training meets difficult inputs: every rank reads on, and all of them count alike (figure R8)."""

import time
from collections import Counter
from functools import partial

import pytest
import torch

from asymlift.data.buckets import Fit
from asymlift.data.catalog import Catalog, open_catalog
from asymlift.data.feed import ExactFeed
from asymlift.data.order import Order, share_of
from asymlift.data.reader import Reader
from asymlift.data.records import BadSample, Sample
from asymlift.families import FAMILIES
from asymlift.families.base import Geometry
from asymlift.stages.finetune.data import check_sample
from tests.reliability.difficult import Corpus, make_shards

GEOMETRY = Geometry(vae_factor=4, channels=4, patch=2)
TEXT = {"encoder_hidden_states": (5, 8)}
BATCH, MICRO_BATCH, SECONDS_A_SAMPLE = 16, 4, 0.5
CHECK = partial(
    check_sample,
    family=FAMILIES["flux2"],
    geometry=GEOMETRY,
    null_text={name: torch.zeros(shape) for name, shape in TEXT.items()},
    text_online=False,
)


def an_epoch(
    catalog: Catalog, world: int, workers: int
) -> tuple[dict[str, Sample], list[BadSample]]:
    """Every sample that all ranks together train on, and every fault that they meet."""
    order = Order(catalog.targets, BATCH, seed=0)
    trained: dict[str, Sample] = {}
    faults: list[BadSample] = []
    for rank in range(world):
        share = share_of(range(BATCH), rank, world, MICRO_BATCH)
        with ExactFeed(catalog, order, share, Reader(), workers=workers, check=CHECK) as feed:
            for step in range(order.steps_per_epoch):
                read = feed.step(step)
                faults += read.faults
                for sample in (s for micro in read.micro_batches for s in micro if s is not None):
                    assert sample.key not in trained, "a sample was seen twice"
                    trained[sample.key] = sample
    return trained, faults


def judge(corpus: Corpus, trained: dict[str, Sample], faults: list[BadSample]) -> None:
    damaged = {damage.shard for damage in corpus.damages}
    told = Counter[str]()
    for case in corpus.cases:
        if case.verdict == "accept":
            sample = trained[case.key]
            assert case.agrees(sample.image.permute(1, 2, 0).numpy()), case.kind
            assert sample.caption == case.caption.strip(), case.kind
            continue
        named = [f for f in faults if case.key in f.where or ascii(case.key)[1:-1] in f.where]
        assert any(f.reason == case.reason and case.shard in f.where for f in named), case
        told[case.reason] += 1
        if case.reason != "duplicate key":
            assert case.key not in trained, case
    counted = Counter(f.reason for f in faults if not any(name in f.where for name in damaged))
    assert counted == told

    either = {key for damage in corpus.damages for key in damage.either}
    plain = {**corpus.plain, **{k: v for d in corpus.damages for k, v in d.intact.items()}}
    accepted = {case.key for case in corpus.cases if case.verdict == "accept"}
    assert trained.keys() - either - accepted <= plain.keys()
    for key, sample in plain.items():
        seen = trained[key]
        assert (seen.image.permute(1, 2, 0).numpy() == sample.picture).all()
        assert seen.caption == sample.caption and seen.latent is not None and seen.text is not None
    for damage in corpus.damages:
        assert not damage.lost & trained.keys(), damage.kind
        assert any(f.reason == damage.reason and damage.shard in f.where for f in faults)


@pytest.mark.parametrize(
    ("difficult", "plain"), [(85, 200), pytest.param(600, 2000, marks=pytest.mark.slow)]
)
def test_every_difficult_sample_is_trained_on_or_named_by_any_number_of_ranks(
    difficult, plain, tmp_path
):
    corpus = make_shards(tmp_path, difficult=difficult, plain=plain, text=TEXT)
    started, totals = time.monotonic(), []
    for world, workers in ((1, 0), (2, 2), (4, 1)):
        catalog = open_catalog(corpus.paths, Fit((32,), GEOMETRY.pixel_patch))
        trained, faults = an_epoch(catalog, world, workers)
        everything = [*catalog.faults, *catalog.refused, *faults]
        judge(corpus, trained, everything)
        totals.append((sorted(trained), sorted(map(str, everything))))
    assert totals[0] == totals[1] == totals[2]
    assert time.monotonic() - started < SECONDS_A_SAMPLE * 3 * (difficult + plain)
