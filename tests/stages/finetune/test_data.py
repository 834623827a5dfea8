"""What training reads of its data, what it makes itself, and what becomes of bad samples."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from asymlift.artifacts.diffusers_folder import DiffusersFolder
from asymlift.artifacts.lifted_folder import Lifted, read_lifted
from asymlift.data.buckets import Fit
from asymlift.data.catalog import Catalog, open_catalog
from asymlift.data.records import LATENT, BadSample, Record, Sample
from asymlift.data.writer import Packed, packed_sample, write_shard
from asymlift.errors import BadData
from asymlift.families import FAMILIES
from asymlift.recipe import DataSection, Recipe
from asymlift.runtime import dist
from asymlift.runtime.dist import Ranks
from asymlift.stages.convert import convert
from asymlift.stages.finetune import ledger as finetune_ledger
from asymlift.stages.finetune.data import (
    check_made,
    check_sample,
    has_every_embedding,
    open_training_data,
    uses_embeddings,
)
from asymlift.stages.finetune.ledger import MIN_SEEN, NAMED, Ledger, Skipped, read_skipped
from tests.reliability.fake_pipeline import FAMILY, PATCH, fake_plan
from tests.stages.small_run import small_recipe

ALONE = Ranks(0, 1, 0)
COUNT = 6
MADE = {"family": "flux2", "latents": "float32", "text": "float32"}


def sample(number: int, *, latent: bool = True, text: bool = True) -> Sample:
    return Sample(
        f"{number:03d}",
        torch.full((3, 8, 8), number, dtype=torch.uint8),
        f"caption {number}",
        latent=torch.zeros(2, 4, 4) if latent else None,
        text={"words": torch.ones(2, 3)} if text else None,
    )


def catalog_of(path: Path, samples: list[Sample] | list[Packed], made=None) -> Catalog:
    return Catalog([write_shard(path, samples, made=made)], Fit(sides=(8,), patch=PATCH))


def data_section(path: Path, **values) -> DataSection:
    return DataSection.model_validate({"train": str(path), "workers": 0, **values})


# ---- what is cached, and what is made while training -------------------------------------------


@pytest.fixture(scope="module")
def lifted(tmp_path_factory) -> Lifted:
    plan = fake_plan(tmp_path_factory.mktemp("model"))
    convert(plan)
    return read_lifted(plan.output)


def recipe_for(path: Path, **values) -> Recipe:
    recipe = small_recipe(path.parent)
    resize = {"sides": [8], "step": PATCH}
    return recipe.model_copy(update={"data": data_section(path, resize=resize, **values)})


@pytest.mark.parametrize(
    ("cached", "text", "source", "expected"),
    [
        # cached (latent, text) in all samples; expected (reads text, text online, latents online)
        ((True, True), "auto", "caption", (True, False, False)),
        ((True, True), "cached", "caption", (True, False, False)),
        ((True, True), "online", "caption", (False, True, False)),
        ((False, True), "auto", "caption", (True, False, True)),
        ((True, False), "auto", "caption", (True, True, False)),
        ((False, False), "auto", "caption", (True, True, True)),
        ((True, False), "cached", "caption", (True, False, False)),  # its samples will be bad
        ((True, True), "auto", "label", (False, True, False)),
    ],
)
def test_what_is_not_cached_is_made_while_training(
    tmp_path, lifted, cached, text, source, expected
):
    latent, words = cached
    samples = [sample(i, latent=latent, text=words) for i in range(COUNT)]
    write_shard(tmp_path / "a.tar", samples)
    recipe = recipe_for(tmp_path / "a.tar", text=text, caption={"source": source})
    found = open_training_data(recipe, lifted, FAMILY, ALONE)
    assert (found.reads_text, found.text_online, found.latents_online) == expected
    assert found.digest == found.catalog.digest()
    record = found.catalog[0]
    if source == "caption":
        read = found.reader().read(record)
        assert (read.text is not None) == (words and expected[0])
        assert (read.latent is not None) == latent


def test_a_few_samples_without_a_cache_keep_the_encoders_loaded(tmp_path, lifted):
    samples = [sample(i, latent=i != 4, text=i != 2) for i in range(COUNT)]
    write_shard(tmp_path / "a.tar", samples)
    found = open_training_data(recipe_for(tmp_path / "a.tar"), lifted, FAMILY, ALONE)
    assert found.text_online and found.latents_online


def several_captions(number: int, cached: int) -> Packed:
    """A sample with three captions, and embeddings of the first so many."""
    plain = packed_sample(replace(sample(number), facts={"captions": ["a", "bb", "c"]}))
    text = plain.members[".text.safetensors"]
    names = [".text.safetensors", ".text1.safetensors", ".text2.safetensors"]
    members = {k: v for k, v in plain.members.items() if k not in names}
    return replace(plain, members=members | dict.fromkeys(names[:cached], text))


@pytest.mark.parametrize("made", [None, MADE])
@pytest.mark.parametrize("choice", ["first", "random", "longest"])
def test_another_caption_than_the_first_is_cached_where_it_was_prepared(tmp_path, made, choice):
    """Nobody else promises more than the embedding of the first."""
    packed = [several_captions(i, 3 if made else 1) for i in range(COUNT)]
    catalog = catalog_of(tmp_path / "a.tar", packed, made)
    data = data_section(tmp_path, caption={"choice": choice})
    assert has_every_embedding(catalog, data) == (choice == "first" or made is not None)


def test_embeddings_of_captions_do_not_serve_for_labels(tmp_path):
    catalog = catalog_of(tmp_path / "a.tar", [sample(i) for i in range(COUNT)])
    labels = {"caption": {"source": "label"}}
    assert uses_embeddings(catalog, data_section(tmp_path))
    assert not uses_embeddings(catalog, data_section(tmp_path, **labels))
    with pytest.raises(BadData, match=r"of captions, and data\.caption\.source is label"):
        uses_embeddings(catalog, data_section(tmp_path, text="cached", **labels))
    prepared = catalog_of(tmp_path / "b.tar", [sample(i) for i in range(COUNT)], MADE)
    assert uses_embeddings(prepared, data_section(tmp_path, text="cached", **labels))
    mixed = Catalog([*prepared.sources, *catalog.sources], prepared.fit)
    assert not uses_embeddings(mixed, data_section(tmp_path, **labels))
    assert not has_every_embedding(mixed, data_section(tmp_path, caption={"choice": "random"}))


def test_prepared_data_has_to_fit_the_model(tmp_path, lifted):
    folder = DiffusersFolder(lifted.folder)
    made = MADE | {
        "vae": folder.fingerprint("vae"),
        "text encoders": folder.text_fingerprint(),
        "text length": 12,
        "prompt": "caption",
    }
    samples = [sample(i) for i in range(COUNT)]

    def check(made: dict, *, reads_text: bool = True, **data) -> None:
        catalog = catalog_of(tmp_path / "a.tar", samples, made)
        recipe = recipe_for(tmp_path / "a.tar", **data)
        check_made(catalog, recipe, lifted, FAMILY, reads_text)

    check(made)
    check(made | {"text length": 77, "prompt": "label"}, reads_text=False)  # not used, so no matter
    others = {"family": "sd3", "vae": "sha256:0", "text encoders": "sha256:0", "text length": 77}
    for key, other in others.items():
        with pytest.raises(BadData, match=f"was prepared with {key} {other}"):
            check(made | {key: other})
    with pytest.raises(BadData, match=r"prompt caption,\nbut this recipe has class"):
        check(made, caption={"source": "class"})


def test_weights_that_the_lifted_folder_states_are_not_read(tmp_path, lifted, monkeypatch):
    made = MADE | {"vae": DiffusersFolder(lifted.folder).fingerprint("vae")}
    catalog = catalog_of(tmp_path / "a.tar", [sample(i) for i in range(COUNT)], made)
    monkeypatch.setattr("asymlift.artifacts.diffusers_folder.sha256_file", None)
    check_made(catalog, recipe_for(tmp_path / "a.tar"), lifted, FAMILY, reads_text=True)


def test_latents_are_encoded_again_where_nobody_says_what_made_them(tmp_path, lifted):
    folder = DiffusersFolder(lifted.folder)
    names = ["first", "second", "third"]
    made = [{"vae": folder.fingerprint("vae")}, None, None]
    for number, (name, facts) in enumerate(zip(names, made, strict=True)):
        samples = [sample(10 * number + i, latent=i > 1) for i in range(4)]
        write_shard(tmp_path / f"{name}.tar", samples, made=facts)
    found = open_training_data(recipe_for(tmp_path / "*.tar"), lifted, FAMILY, ALONE)
    assert [r.key for r in found.foreign_latents()] == ["012", "013", "022", "023"]
    assert all(LATENT in r.parts for r in found.foreign_latents())


def test_latents_of_a_stream_are_looked_at_too(tmp_path, lifted):
    write_shard(tmp_path / "a.tar", [sample(i, latent=i > 1) for i in range(40)])
    recipe = recipe_for(tmp_path / "a.tar", mode="stream")
    found = open_training_data(recipe, lifted, FAMILY, ALONE)
    assert [r.key for r in found.foreign_latents()] == [f"{i:03d}" for i in range(2, 16)]


def test_ranks_that_find_different_samples_are_refused(tmp_path, lifted, monkeypatch):
    write_shard(tmp_path / "a.tar", [sample(i) for i in range(COUNT)])
    monkeypatch.setattr(dist, "gathered", lambda ranks, value: [value, "sha256:other"])
    with pytest.raises(BadData, match="ranks 0 and 1 find different samples"):
        open_training_data(recipe_for(tmp_path / "a.tar"), lifted, FAMILY, ALONE)


# ---- what fits the model -----------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "text_online", "reason"),
    [
        ({}, False, None),
        ({"latent": torch.zeros(3, 4, 4)}, False, "latent has the wrong number of channels"),
        ({"latent": torch.zeros(2, 4, 6)}, False, "latent has the wrong shape"),
        ({"latent": None}, False, None),
        ({"text": {"words": torch.ones(2, 4)}}, True, "text embedding does not fit"),
        ({"text": {"letters": torch.ones(2, 3)}}, True, "text embedding does not fit"),
        ({"text": None}, True, None),
        ({"text": None}, False, "no text embedding"),
    ],
)
def test_a_sample_that_does_not_fit_is_a_bad_one(tmp_path, lifted, change, text_online, reason):
    record = Record("key", "a.tar!key", {}, 8, 8)
    options = {
        "family": FAMILIES["flux2"],
        "geometry": lifted.geometry,
        "null_text": {"words": torch.zeros(2, 3)},
        "text_online": text_online,
    }
    if reason is None:
        check_sample(record, replace(sample(0), **change), **options)
        return
    with pytest.raises(BadSample) as found:
        check_sample(record, replace(sample(0), **change), **options)
    assert (found.value.reason, found.value.where) == (reason, "a.tar!key")


# ---- bad samples -------------------------------------------------------------------------------


def fault(number: int, reason: str = "too blue") -> BadSample:
    return BadSample(f"a.tar!{number:03d}", reason, "detail")


def lines_in(folder: Path) -> list[dict]:
    paths = sorted((folder / "logs").glob("*.jsonl"))
    return [json.loads(line) for path in paths for line in path.read_text().splitlines()]


def test_a_bad_sample_is_named_once_however_often_it_fails(tmp_path, capfd):
    ledger = Ledger(tmp_path, ALONE, 0.5)
    for _ in range(3):  # epochs
        ledger.note([fault(1)], 5, 1)
        ledger.note([], 6, 0)
        ledger.note([fault(2), fault(3, "too red")], 4, 2)
    assert [line["sample"] for line in lines_in(tmp_path)] == [
        "a.tar!001",
        "a.tar!002",
        "a.tar!003",
    ]
    assert ledger.reasons == {"too blue": 2, "too red": 1}
    assert (ledger.num_seen, ledger.num_bad) == (54, 9)
    assert capfd.readouterr().err.count("left out") == 3

    again = Ledger(tmp_path, ALONE, 0.5)  # the run goes on
    again.note([fault(2), fault(4)], 4, 2)
    assert len(lines_in(tmp_path)) == 4
    assert again.reasons == {"too blue": 3, "too red": 1}


def test_a_few_of_a_kind_are_named_on_the_screen_and_all_in_the_log(tmp_path, capfd):
    ledger = Ledger(tmp_path, ALONE, 0.5)
    for number in range(20):
        ledger.note([fault(number)], 7, 1)
    said = capfd.readouterr().err
    assert said.count("too blue (detail); left out") == NAMED
    assert len(lines_in(tmp_path)) == 20


def test_what_was_wrong_before_the_first_sample_is_in_the_same_ledger(tmp_path):
    write_shard(tmp_path / "a.tar", [sample(i) for i in range(COUNT)])
    write_shard(tmp_path / "b.tar", [sample(i) for i in range(COUNT - 1, 2 * COUNT)])
    data = (tmp_path / "b.tar").read_bytes()
    (tmp_path / "b.tar").write_bytes(data[: len(data) // 2])
    catalog = open_catalog(str(tmp_path / "*.tar"), Fit(sides=(8,), patch=PATCH))
    for _ in range(2):  # a run, and its continuation
        ledger = Ledger(tmp_path, ALONE, 0.9)
        ledger.open(catalog)
        assert sum(ledger.reasons.values()) == catalog.num_lost
        assert ledger.reasons["duplicate key"] == 1
        assert len(lines_in(tmp_path)) == len(catalog.faults)
    cut = next(line for line in lines_in(tmp_path) if line["reason"] == "shard is cut off")
    assert cut["count"] > 1
    assert ledger.num_seen == ledger.num_bad == 0  # of what was read
    with pytest.raises(BadData, match=r"samples cannot be used .*allowed are 1\.00%"):
        Ledger(tmp_path, ALONE, 0.01).open(catalog)


def test_too_many_end_the_run_and_early_on_the_share_says_little(tmp_path):
    ledger = Ledger(tmp_path, ALONE, 0.01)
    allowed = int(0.01 * MIN_SEEN)
    for number in range(allowed):
        ledger.note([fault(number)], 0, 1)
    with pytest.raises(BadData) as stop:
        ledger.note([fault(99, "too red")], 0, 1)
    said = str(stop.value)
    assert "11 of 11 samples are bad, more than data.max_bad_fraction 0.01 allows" in said
    assert "a.tar!099: too red (detail)" in said and "too blue 10, too red 1" in said


def test_too_many_of_a_small_dataset_end_the_run_before_an_epoch_is_over(tmp_path):
    """What an earlier run could not read may be sound by now, so it does not count."""
    catalog = catalog_of(tmp_path / "a.tar", [sample(i) for i in range(40)])
    for _ in range(2):
        ledger = Ledger(tmp_path, ALONE, 0.05)
        ledger.open(catalog)
        for number in (1, 2, 1):
            ledger.note([fault(number)], 3, 1)
        with pytest.raises(
            BadData, match=r"3 of all 40 samples are bad, more than .* 0\.05 allows"
        ):
            ledger.note([fault(3)], 3, 1)
    assert len(lines_in(tmp_path)) == 3


def test_a_share_that_is_allowed_stays_so_over_the_epochs(tmp_path):
    ledger = Ledger(tmp_path, ALONE, 0.01)
    for _ in range(1000):
        ledger.note([fault(1)], 99, 1)
    assert ledger.num_bad == 1000 and len(lines_in(tmp_path)) == 1


def test_what_another_rank_read_counts_and_is_written_by_it(tmp_path, monkeypatch):
    ledger = Ledger(tmp_path, ALONE, 0.01)
    theirs = [Skipped("a.tar!007", "too red", "", 1)]
    monkeypatch.setattr(finetune_ledger.dist, "gathered", lambda ranks, mine: [mine, theirs])
    ledger.note([fault(1)], 6, 2)
    assert ledger.reasons == {"too blue": 1, "too red": 1}
    assert [line["sample"] for line in lines_in(tmp_path)] == ["a.tar!001"]
    ledger.note([fault(7)], 7, 1)  # in the next epoch it comes to this rank
    assert ledger.reasons == {"too blue": 1, "too red": 1}
    assert len(lines_in(tmp_path)) == 1


def test_a_full_disk_costs_the_names_and_not_the_run(tmp_path, capfd):
    (tmp_path / "logs").touch()  # a file where a folder should be
    ledger = Ledger(tmp_path, ALONE, 0.5)
    for number in (1, 2):
        ledger.note([fault(number)], 5, 1)
    said = capfd.readouterr().err
    assert said.count("skipped-0.jsonl: File exists; training goes on without its lines") == 1
    assert ledger.reasons == {"too blue": 2}


def test_a_line_that_a_kill_cut_off_is_passed_over(tmp_path):
    Ledger(tmp_path, ALONE, 0.5).note([fault(1)], 7, 1)
    log = tmp_path / "logs" / "skipped-0.jsonl"
    log.write_text(log.read_text() + '{"sample": "a.tar!00')
    assert [line.sample for line in read_skipped(tmp_path)] == ["a.tar!001"]
