"""prepare end to end, on the embedded model: what goes in, what comes out, what is refused."""

import io
import json
import os
import shutil
import signal
import subprocess
import sys
import tarfile
import time
from dataclasses import replace
from pathlib import Path
from threading import Event, Thread

import numpy as np
import pytest
import torch
import yaml
from PIL import Image
from typer.testing import CliRunner

from asymlift.artifacts.files import exclusive_lock
from asymlift.artifacts.manifest import check_manifest, read_manifest
from asymlift.cli import app
from asymlift.data.buckets import fit_image
from asymlift.data.catalog import open_catalog
from asymlift.data.packing import unpack
from asymlift.data.pictures import decode_image
from asymlift.data.table import index_path, load_table, save_table
from asymlift.data.writer import Packed, write_shard
from asymlift.embedded import MODELS
from asymlift.errors import BadData, BadRecipe, CannotWrite, StoppedEarly, Unavailable
from asymlift.recipe import check_recipe
from asymlift.stages.open_data import fit_of
from asymlift.stages.prepare import finish as prepare_finish
from asymlift.stages.prepare import job as prepare_job_module
from asymlift.stages.prepare import run as stage
from asymlift.stages.prepare import shard as prepare_shard
from asymlift.stages.prepare.run import Share, prepare
from asymlift.stages.prepare.work import agreed_layout
from asymlift.stages.verbs import (
    after_prepare,
    describe_preparation,
    estimate_prepare,
    prepare_job,
    share_for,
)
from tests.data.small_shards import raw_tar
from tests.stages.prepare.small_prepare import (
    RESIZE,
    caption_of,
    check_sample,
    content,
    draw,
    encoded,
    facts_of,
    image_in,
    make_folder,
    members,
    recipe_for,
    rejected,
    run,
    shards,
    values_for,
)

ROOT = Path(__file__).parents[3]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A folder of 20 pictures, prepared."""
    place = tmp_path_factory.mktemp("prepared")
    make_folder(place / "source")
    run(recipe_for(place))
    return place


# ---- what goes in ----------------------------------------------------------------------------


def as_folder(place):
    make_folder(place, 6)
    return place


def as_table(kind):
    def make(place):
        make_folder(place, 6, captions=False)
        rows = [{"file_name": f"{n:03d}.png", "text": caption_of(n)} for n in range(6)]
        table = place / f"metadata{kind}"
        if kind == ".jsonl":
            table.write_text("".join(json.dumps(row) + "\n" for row in rows))
        elif kind == ".csv":
            lines = [f"{row['file_name']},{row['text']}\n" for row in rows]
            table.write_text("file_name,text\n" + "".join(lines))
        else:
            arrow = pytest.importorskip("pyarrow")
            from pyarrow import parquet

            parquet.write_table(arrow.Table.from_pylist(rows), table)
        return place

    return make


def as_parquet_of_bytes(place):
    """As Hugging Face writes them: the pictures are in the table."""
    arrow = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    place.mkdir()
    rows = [
        {"image": {"bytes": encoded(draw(n)), "path": None}, "text": caption_of(n)}
        for n in range(6)
    ]
    parquet.write_table(arrow.Table.from_pylist(rows), place / "train.parquet")
    return place / "train.parquet"


def as_shards(place, *, facts=False):
    """Plain WebDataset; with facts, as img2dataset leaves them."""
    place.mkdir()
    with tarfile.open(place / "00000.tar", "w") as tar:
        for number in range(6):
            parts = {".png": encoded(draw(number)), ".txt": caption_of(number).encode()}
            if facts:
                said = {"url": "http://x/y.jpg", "status": "success", "caption": "other"}
                said |= {"width": 40, "height": 36, "original_width": 400, "original_height": 360}
                parts[".json"] = json.dumps(said).encode()
            for suffix, data in parts.items():
                info = tarfile.TarInfo(f"{number:09d}{suffix}")
                info.size = len(data)
                tar.addfile(info, io.BytesIO(data))
    return place


def as_img2dataset(place):
    source = as_shards(place, facts=True)
    (source / "00000_stats.json").write_text("{}")
    (source / "00000.parquet").write_bytes(b"")
    return source


INPUTS = {
    "folder": as_folder,
    "jsonl": as_table(".jsonl"),
    "csv": as_table(".csv"),
    "parquet": as_table(".parquet"),
    "parquet of bytes": as_parquet_of_bytes,
    "shards": as_shards,
    "img2dataset": as_img2dataset,
}


@pytest.mark.parametrize("kind", INPUTS)
def test_every_kind_of_input_becomes_shards_that_say_what_it_said(kind, tmp_path):
    source = INPUTS[kind](tmp_path / "source")
    report = run(recipe_for(tmp_path, source))
    assert (report.num_samples, report.num_shards, report.rejected) == (6, 1, {})

    found = members(tmp_path / "out")
    captions = sorted(sample[".txt"].decode() for sample in found.values())
    assert captions == sorted(map(caption_of, range(6)))
    for sample in found.values():
        check_sample(sample, [sample[".txt"].decode()])
    if kind == "img2dataset":
        facts = facts_of(found["000000003"])
        assert (facts["url"], facts["width"], facts["height"]) == ("http://x/y.jpg", 32, 32)
        assert (facts["original_width"], facts["original_height"]) == (400, 360)


def test_webdataset_itself_reads_the_shards(folder):
    import webdataset

    paths = [str(path) for path in shards(folder / "out")]
    read = list(webdataset.WebDataset(paths, shardshuffle=False))
    keys = {"jpg", "txt", "json", "latent.safetensors", "text.safetensors"}
    assert len(read) == 20
    for sample in read:
        assert keys <= sample.keys()
        assert sample["txt"].decode() == caption_of(int(sample["__key__"]))


def test_the_catalog_opens_them_at_the_size_they_have(folder):
    recipe = recipe_for(folder)
    catalog = open_catalog(str(folder / "out"), fit_of(recipe.data.resize, 8))
    made = catalog.made
    assert made["family"] == "flux2"
    assert made["resize"] == recipe.data.resize.model_dump()
    assert (made["latents"], made["text"]) == ("float16", "bfloat16")
    assert made["vae"].startswith("sha256:") and made["text encoders"].startswith("sha256:")
    assert len(catalog) == 20 and not catalog.faults and not catalog.refused
    for record in catalog:
        assert record.target == (record.height, record.width)
        assert record.width % 8 == record.height % 8 == 0


def test_a_picture_is_brought_to_its_bucket_as_training_would_bring_it(tmp_path):
    """Bitwise, in PNG: prepare and a run on the folder itself see the same pixels."""
    recipe = recipe_for(tmp_path, make_folder(tmp_path / "source"), image="png")
    run(recipe)
    found = members(tmp_path / "out")
    catalog = open_catalog(str(tmp_path / "source"), fit_of(recipe.data.resize, 8))
    assert len(found) == len(catalog) == 20
    for record in catalog:
        original = decode_image((tmp_path / "source" / f"{record.key}.png").read_bytes())
        assert torch.equal(image_in(found[record.key]), fit_image(original, *record.target))


@pytest.mark.parametrize(("kind", "suffix"), [("jpeg", ".jpg"), ("webp", ".webp"), ("png", ".png")])
def test_latents_are_those_of_the_picture_as_it_is_stored(kind, suffix, tmp_path):
    make_folder(tmp_path / "source", 4)
    run(recipe_for(tmp_path, image=kind, quality=30))
    for sample in members(tmp_path / "out").values():
        assert suffix in sample
        check_sample(sample, [sample[".txt"].decode()])


def test_source_bytes_stay_where_no_pixel_changes(tmp_path):
    source = tmp_path / "source"
    source.mkdir()
    kept = {
        "jpeg": encoded(draw(0, 32, 32), "JPEG", quality=40, comment=b"kept"),
        "png": encoded(draw(1, 32, 32)),
        "webp": encoded(draw(2, 40, 24), "WEBP", quality=50),
    }
    turned = Image.Exif()
    turned[0x0112] = 3
    changed = {
        "larger": encoded(draw(3, 33, 32)),
        "turned": encoded(draw(4, 32, 32), "JPEG", exif=turned.tobytes()),
        "clear": encoded(np.dstack([draw(5, 32, 32), draw(6, 32, 32)[..., 0]])),
        "deep": encoded(draw(7, 32, 32)[..., 0].astype(np.uint16) * 257),
    }
    for name, data in (kept | changed).items():
        (source / f"{name}.jpg").write_bytes(data)  # what a file is called decides nothing
    run(recipe_for(tmp_path))
    found = members(tmp_path / "out")
    for name, suffix in {"jpeg": ".jpg", "png": ".png", "webp": ".webp"}.items():
        assert found[name][suffix] == kept[name]
    for name, data in changed.items():
        assert ".jpg" in found[name] and found[name][".jpg"] != data
        assert (facts_of(found[name])["width"], facts_of(found[name])["height"]) == (32, 32)


# ---- captions and classes --------------------------------------------------------------------


def test_several_captions_are_stored_and_encoded_each(tmp_path):
    make_folder(tmp_path / "source", 3)
    (tmp_path / "source" / "001.txt").write_text("a red disc\n\n a teal cross \n")
    run(recipe_for(tmp_path, data=RESIZE | {"caption": {"lines": True}}))
    found = members(tmp_path / "out")
    assert found["001"][".txt"] == b"a red disc"
    assert facts_of(found["001"])["captions"] == ["a red disc", "a teal cross"]
    check_sample(found["001"], ["a red disc", "a teal cross"])
    assert "captions" not in facts_of(found["000"])


def test_a_picture_without_a_caption_gets_the_embedding_of_nothing(tmp_path):
    make_folder(tmp_path / "source", 1, captions=False)
    run(recipe_for(tmp_path))
    (sample,) = members(tmp_path / "out").values()
    assert ".txt" not in sample
    check_sample(sample, [""])


@pytest.mark.parametrize(("prompt", "wanted"), [("label", {"0", "1"}), ("class", {"cat", "dog"})])
def test_classes_are_folders_and_may_be_prompts(prompt, wanted, tmp_path):
    for name in ("dog", "cat"):
        make_folder(tmp_path / "source" / name, 3)
    run(recipe_for(tmp_path, data=RESIZE | {"caption": {"labels": "folder", "source": prompt}}))
    found = members(tmp_path / "out")
    said = set()
    for sample in found.values():
        facts = facts_of(sample)
        assert facts["class"] == ("cat", "dog")[facts["label"]]
        said.add(str(facts[prompt]))
        check_sample(sample, [str(facts[prompt])])
        assert sample[".txt"].startswith(b"a ")  # captions stay, for another run
    assert said == wanted
    facts = read_manifest(tmp_path / "out").facts
    assert facts["report"]["class_names"] == ["cat", "dog"]
    assert facts["plan"]["prompt"] == prompt


def test_classes_come_from_a_column(tmp_path):
    make_folder(tmp_path / "source", 4, captions=False)
    rows = [{"file_name": f"{n:03d}.png", "kind": ("owl", "ant")[n % 2]} for n in range(4)]
    table = tmp_path / "source" / "metadata.jsonl"
    table.write_text("".join(json.dumps(row) + "\n" for row in rows))
    report = run(
        recipe_for(tmp_path, data=RESIZE | {"caption": {"labels": "kind", "source": "class"}})
    )
    assert report.class_names == ["ant", "owl"]
    labels = {key: facts_of(sample)["label"] for key, sample in members(tmp_path / "out").items()}
    assert labels == {"000": 1, "001": 0, "002": 1, "003": 0}


def test_sources_that_number_classes_differently_are_refused(tmp_path):
    for source, name in (("one", "cat"), ("two", "dog")):
        make_folder(tmp_path / source / name, 1)
    sources = [tmp_path / "one", tmp_path / "two"]
    recipe = recipe_for(tmp_path, sources, data=RESIZE | {"caption": {"labels": "folder"}})
    with pytest.raises(BadData, match="number their classes differently"):
        run(recipe)


def test_half_a_character_is_a_reject_not_a_crash(tmp_path):
    make_folder(tmp_path / "source", 2)
    source = as_shards(tmp_path / "shards")
    with tarfile.open(source / "00001.tar", "w") as tar:
        for suffix, data in {
            ".png": encoded(draw(9)),
            ".json": b'{"captions": ["\\ud800", "b"]}',
        }.items():
            info = tarfile.TarInfo(f"half{suffix}")
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    report = run(recipe_for(tmp_path, source))
    assert report.rejected == {"caption is not UTF-8": 1}
    assert rejected(tmp_path / "out")[0]["sample"].endswith("00001.tar!half")


# ---- what may be left out --------------------------------------------------------------------


@pytest.mark.parametrize("latents", ["none", "float32"])
@pytest.mark.parametrize("text", ["none", "float8"])
def test_each_cache_is_optional_and_of_the_dtype_that_is_asked_for(latents, text, tmp_path):
    make_folder(tmp_path / "source", 2)
    report = run(recipe_for(tmp_path, latents=latents, text=text))
    for sample in members(tmp_path / "out").values():
        assert (".latent.safetensors" in sample) == (latents != "none")
        assert (".text.safetensors" in sample) == (text != "none")
        if latents != "none":
            assert unpack(sample[".latent.safetensors"])["latent"].dtype == torch.float32
    assert ("vae" in report.made) == (latents != "none")
    assert ("text encoders" in report.made) == (text != "none")


def test_latents_are_made_anew_without_the_pictures(folder, tmp_path):
    """The same keys and sizes; nothing but latents is stored."""
    recipe = recipe_for(
        tmp_path, folder / "out", data={}, image="none", latents="float32", text="none"
    )
    report = run(recipe)
    old, new = members(folder / "out"), members(tmp_path / "out")
    assert list(new) == list(old) and report.num_samples == 20
    for key, sample in new.items():
        assert list(sample) == [".latent.safetensors"]
        latent = unpack(sample[".latent.safetensors"])["latent"]
        before = unpack(old[key][".latent.safetensors"])["latent"]
        torch.testing.assert_close(latent, before.float(), rtol=1e-3, atol=1e-3)
    assert sizes_in(tmp_path / "out") == sizes_in(folder / "out")
    assert report.made["resize"] == recipe_for(tmp_path).data.resize.model_dump()
    assert not (tmp_path / "out" / "contact-sheet.png").exists()


def sizes_in(out):
    tables = [load_table(path, index_path(path)) for path in shards(out)]
    return {key: size for t in tables for key, size in zip(t.keys(), t.sizes.tolist(), strict=True)}


def test_only_prepared_pictures_can_stay_where_they_are(folder, tmp_path):
    with pytest.raises(BadRecipe, match="image: none is for a source of shards that were prepared"):
        run(recipe_for(tmp_path, folder / "source", image="none"))
    other = {"resize": {"sides": [16]}}
    with pytest.raises(BadRecipe, match=r"made with data.resize .*\[32\].* says .*\[16\]"):
        run(recipe_for(tmp_path, folder / "out", data=other, image="none"))
    with pytest.raises(BadData, match=r"was prepared, .* was not: prepare them apart"):
        run(recipe_for(tmp_path, [folder / "out", folder / "source"]))
    with pytest.raises(BadRecipe, match="are all none: nothing would be written"):
        recipe_for(tmp_path, image="none", latents="none", text="none")


def test_prepared_shards_can_be_prepared_again_at_another_size_or_as_they_are(folder, tmp_path):
    small = recipe_for(tmp_path, folder / "out", data={"resize": {"sides": [16]}})
    report = run(small)
    assert report.num_samples == 20 and report.made["resize"]["sides"] == [16]
    assert all(max(size) < 32 for size in sizes_in(tmp_path / "out").values())
    same = recipe_for(tmp_path, folder / "out", data={}, out=str(tmp_path / "again"))
    run(same)
    old, again = members(folder / "out"), members(tmp_path / "again")
    assert {k: s[".jpg"] for k, s in old.items()} == {k: s[".jpg"] for k, s in again.items()}
    assert facts_of(again["003"])["original_width"] == facts_of(old["003"])["original_width"] > 32


def test_a_prepared_source_in_which_a_picture_does_not_fit_whole_patches(folder, tmp_path):
    """Nobody can make such a shard but by hand; the picture is left out, by its reason."""
    odd = Packed("odd", {".png": encoded(draw(0, 33, 32))}, 33, 32)
    made = recipe_for(folder).data.resize.model_dump()
    write_shard(tmp_path / "odd" / "000000.tar", [odd], made={"resize": made})
    recipe = recipe_for(tmp_path, tmp_path / "odd", data={}, image="none", text="none")
    with pytest.raises(BadData, match="would be resized: 1"):
        run(recipe)


# ---- the same bytes, whoever makes them ------------------------------------------------------


@pytest.mark.parametrize("order", [[0, 1], [1, 0], [2, 0, 1], [1, 2, 0]])
def test_tasks_in_any_order_make_the_bytes_of_one(order, folder, tmp_path):
    recipe = recipe_for(tmp_path, folder / "source")
    done = [run(recipe, number, len(order)) for number in order]
    assert [report.complete for report in done] == [False] * (len(order) - 1) + [True]
    assert done[0].num_missing == 3 - done[0].num_made
    assert content(tmp_path / "out") == content(folder / "out")
    assert not (tmp_path / "out.unfinished").exists()


def test_workers_and_what_the_cache_of_captions_holds_change_no_byte(folder, tmp_path, monkeypatch):
    monkeypatch.setattr(prepare_shard, "TEXT_CACHE", 1)
    run(recipe_for(tmp_path, folder / "source", data=RESIZE | {"workers": 0}))
    assert content(tmp_path / "out") == content(folder / "out")


def test_the_same_command_again_changes_nothing(folder):
    before = {
        path: (path.stat().st_ino, path.stat().st_mtime_ns) for path in shards(folder / "out")
    }
    report = run(recipe_for(folder))
    assert report.already_done and report.num_samples == 20
    assert before == {p: (p.stat().st_ino, p.stat().st_mtime_ns) for p in shards(folder / "out")}


def test_finished_shards_are_not_made_again(folder, tmp_path):
    recipe = recipe_for(tmp_path, folder / "source")
    run(recipe, 1, 3)
    (shard,) = shards(tmp_path / "out")
    before = shard.stat()
    run(recipe)
    assert (shard.stat().st_ino, shard.stat().st_mtime_ns) == (before.st_ino, before.st_mtime_ns)
    assert content(tmp_path / "out") == content(folder / "out")


def test_a_shard_of_another_purpose_or_cut_short_is_not_taken_for_finished(folder, tmp_path):
    recipe, out = recipe_for(tmp_path, folder / "source"), tmp_path / "out"
    run(recipe, 0, 3)
    run(recipe, 1, 3)
    cut, foreign = shards(out)
    cut.write_bytes(cut.read_bytes()[:-512])
    table = load_table(foreign, index_path(foreign))
    save_table(replace(table, facts={**table.facts, "made": {"vae": "other"}}), index_path(foreign))
    run(recipe)
    assert content(out) == content(folder / "out")


def test_two_tasks_at_once_and_the_one_that_comes_second_to_finishing(
    folder, tmp_path, monkeypatch
):
    recipe, inside, go = recipe_for(tmp_path, folder / "source"), Event(), Event()

    def slow(*arguments):
        inside.set()
        go.wait(60)
        return prepare_finish.finish(*arguments)

    monkeypatch.setattr(stage, "finish", slow)
    reports = []
    run(recipe, 0, 2)
    last = Thread(target=lambda: reports.append(run(recipe, 1, 2)))
    last.start()
    assert inside.wait(60)
    second = run(recipe, 0, 2)  # finds everything there, while the other one finishes
    assert not second.complete and second.num_missing == 0
    assert describe_preparation(second) == [
        "this task made 0 of 3 shards; another task is finishing"
    ]
    go.set()
    last.join()
    assert reports[0].complete
    assert content(tmp_path / "out") == content(folder / "out")


def test_a_task_that_is_running_is_not_started_twice(folder, tmp_path):
    recipe = recipe_for(tmp_path, folder / "source")
    run(recipe, 1, 2)
    lock = tmp_path / "out.unfinished" / "task-0-of-2.lock"
    with exclusive_lock(lock, "it"), pytest.raises(CannotWrite, match="is at work on this share"):
        run(recipe, 0, 2)


def test_the_first_of_ranks_waits_for_the_others_and_finishes(folder, tmp_path, monkeypatch):
    monkeypatch.setattr(stage, "POLL", 0.01)
    recipe, reports = recipe_for(tmp_path, folder / "source"), []
    first = Thread(target=lambda: reports.append(run(recipe, 0, 2, together=True)), daemon=True)
    first.start()
    while len(shards(tmp_path / "out")) < 2:
        time.sleep(0.01)
    assert first.is_alive()
    other = run(recipe, 1, 2, together=True)
    first.join(60)
    assert not other.complete and other.num_missing == 0
    assert reports[0].complete
    assert content(tmp_path / "out") == content(folder / "out")


def test_the_first_of_ranks_does_not_wait_for_ever(folder, tmp_path, monkeypatch):
    monkeypatch.setattr(stage, "POLL", 0.01)
    monkeypatch.setattr(stage, "PATIENCE", 0.1)
    with pytest.raises(StoppedEarly, match=r"1 shard of other tasks missing, and nothing has"):
        run(recipe_for(tmp_path, folder / "source"), 0, 2, together=True)


# ---- what is refused -------------------------------------------------------------------------


CHANGES = {
    "image": ({"image": "png"}, "made with image jpeg, now png"),
    "dtype": ({"latents": "float32"}, "made with latents float16, now float32"),
    "size": (
        {"data": {"resize": {"sides": [16]}}},
        r"made with resize\.sides \[32\], now \[16\]\.",
    ),
    "batch": ({"batch": 3}, "made with batch 8, now 3"),
    "shards": ({"shard_samples": 9}, "made with shard_samples 8, now 9"),
}


@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("complete", [True, False])
def test_other_settings_are_refused_with_both_values_until_overwritten(
    complete, change, folder, tmp_path
):
    settings, message = CHANGES[change]
    recipe = recipe_for(tmp_path, folder / "source")
    for number in range(2 if complete else 1):
        run(recipe, number, 2)
    other = recipe_for(tmp_path, folder / "source", **settings)
    with pytest.raises(CannotWrite, match=message):
        run(other)
    report = run(other, overwrite=True)
    assert report.complete and not check_manifest(tmp_path / "out")
    assert not (tmp_path / "out.unfinished").exists()


def test_a_picture_more_or_another_caption_is_refused(folder, tmp_path):
    make_folder(tmp_path / "source", 4)
    run(recipe_for(tmp_path))
    (tmp_path / "source" / "002.txt").write_text("another caption")
    with pytest.raises(CannotWrite, match=r"other pictures or captions, sha256:.*, now sha256:"):
        run(recipe_for(tmp_path))
    make_folder(tmp_path / "source", 5)
    with pytest.raises(CannotWrite, match="made with pictures 4, now 5"):
        run(recipe_for(tmp_path))


def test_overwriting_begins_anew_where_only_the_plan_is_there(folder, tmp_path):
    job = prepare_job(recipe_for(tmp_path, folder / "source"))
    agreed_layout(job.out, job.plan, lambda: 5)
    assert not job.out.exists()
    run(recipe_for(tmp_path, folder / "source", batch=3), overwrite=True)
    assert len(shards(tmp_path / "out")) == 3
    with pytest.raises(BadRecipe, match="--overwrite would remove what other tasks make"):
        run(recipe_for(tmp_path, folder / "source"), 0, 2, overwrite=True)


def test_a_damaged_plan_and_a_damaged_result_are_named(folder, tmp_path):
    recipe = recipe_for(tmp_path, folder / "source")
    run(recipe, 0, 2)
    plan = tmp_path / "out.unfinished" / "plan.json"
    plan.write_text("{}")
    with pytest.raises(BadData, match=r"plan.json: damaged; --overwrite begins anew"):
        run(recipe)
    run(recipe, overwrite=True)
    first = shards(tmp_path / "out")[0]
    first.write_bytes(first.read_bytes()[:512])
    with pytest.raises(BadData, match=r"512 bytes, not .*, though it was finished; --overwrite"):
        run(recipe)
    first.unlink()
    with pytest.raises(BadData, match="missing, though it was finished"):
        run(recipe)
    run(recipe, overwrite=True)
    assert content(tmp_path / "out") == content(folder / "out")


@pytest.mark.parametrize("name", ["photo.png", "000000.tar", "000000.tar.bak", "notes"])
def test_a_folder_with_other_files_is_refused_and_left_alone(name, folder, tmp_path):
    """A shard too is somebody else's where no plan and no manifest says otherwise."""
    out = tmp_path / "out"
    out.mkdir()
    (out / name).write_text("mine")
    for overwrite in (False, True):
        with pytest.raises(CannotWrite, match=rf"out: holds other files \({name}\)"):
            run(recipe_for(tmp_path, folder / "source"), overwrite=overwrite)
    assert content(out) == {name: b"mine"}


def test_what_a_kill_leaves_is_ours_and_goes(folder, tmp_path):
    recipe, out = recipe_for(tmp_path, folder / "source"), tmp_path / "out"
    run(recipe, 0, 3)
    left = [".000001.tar.77.part", ".000001.index.safetensors.0a1b", "rejected.jsonl.part"]
    left += [".000001.index.safetensors.0a1b.part", "manifest.json.part", "contact-sheet.png.part"]
    for name in left:
        (out / name).write_text("half")
    run(recipe)
    assert content(out) == content(folder / "out")


def test_out_and_source_keep_apart(folder, tmp_path):
    make_folder(tmp_path / "source", 2)
    inside = str(tmp_path / "source" / "out")
    with pytest.raises(BadRecipe, match="is inside the source"):
        run(recipe_for(tmp_path, out=inside))
    with pytest.raises(BadRecipe, match=r"out: .* holds 000000.tar of the source"):
        run(recipe_for(tmp_path, folder / "out", out=str(folder / "out")))
    table = tmp_path / "source" / "pictures.csv"
    table.write_text("file_name,text\n000.png,a\n")
    with pytest.raises(BadRecipe, match="is inside the source"):
        run(recipe_for(tmp_path, table, out=str(tmp_path / "source")))
    assert len(list(table.parent.iterdir())) == 5


def test_no_source_and_an_empty_one_are_named(tmp_path):
    with pytest.raises(BadData, match="there is no such file or folder"):
        run(recipe_for(tmp_path))
    (tmp_path / "source").mkdir()
    with pytest.raises(BadData, match="holds no pictures that can be used"):
        run(recipe_for(tmp_path))
    (tmp_path / "source" / "x.tar").write_bytes(b"")
    with pytest.raises(BadData, match=r"source: nothing to prepare\n.*x.tar: not a tar"):
        run(recipe_for(tmp_path))
    with pytest.raises(BadRecipe, match="the recipe has no `prepare` section"):
        run(recipe_for(tmp_path).model_copy(update={"prepare": None}))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["source"]


def test_when_all_pictures_are_too_small_the_message_says_what_would_help(tmp_path):
    make_folder(tmp_path / "source", 5)
    with pytest.raises(BadData) as caught:
        run(recipe_for(tmp_path, data={"resize": {"sides": [128]}}))
    first, second, third = str(caught.value).splitlines()
    assert first.endswith("source: none of 5 pictures can be used (too small: 5)")
    assert "the smallest bucket that fits is" in second
    assert "data.resize.sides: [128, 64, 32] would keep 5 of 5" in third
    assert not (tmp_path / "out").exists()


def test_when_all_pictures_are_broken_the_message_names_some(tmp_path):
    (tmp_path / "source").mkdir()
    for number in range(3):
        (tmp_path / "source" / f"{number}.png").write_bytes(b"broken")
    with pytest.raises(BadData, match=r"none of 3 .*not a JPEG, PNG or WebP image: 3") as caught:
        run(recipe_for(tmp_path))
    assert len(str(caught.value).splitlines()) == 3


def test_when_the_last_usable_picture_goes_after_the_plan_was_made(tmp_path):
    make_folder(tmp_path / "source", 2)
    job = prepare_job(recipe_for(tmp_path))
    agreed_layout(job.out, job.plan, lambda: 8)
    for path in (tmp_path / "source").glob("*.png"):
        path.write_bytes(b"x" * path.stat().st_size)
    with pytest.raises(BadData, match="none of 2 pictures can be used"):
        run(recipe_for(tmp_path))


def test_a_missing_file_is_a_reject_and_a_missing_source_the_end(folder, tmp_path):
    source = make_folder(tmp_path / "source")
    recipe = recipe_for(tmp_path)
    job = prepare_job(recipe)
    (source / "003.png").unlink()
    report = prepare(job, Share(), overwrite=False)
    assert report.rejected == {"file is missing": 1}
    assert rejected(tmp_path / "out")[0]["sample"] == str(source / "003.png")

    make_folder(source)
    again = prepare_job(recipe_for(tmp_path, out=str(tmp_path / "again")))
    agreed_layout(again.out, again.plan, lambda: 8)
    source.rename(tmp_path / "elsewhere")
    with pytest.raises(Unavailable, match=r"source: the source is gone. Finished shards are kept"):
        prepare(again, Share(), overwrite=False)
    assert not shards(tmp_path / "again")


def test_a_model_without_text_encoders_is_named(folder, tmp_path):
    model = tmp_path / "model"
    shutil.copytree(MODELS["tiny"], model)
    index = json.loads((model / "model_index.json").read_text())
    for name in [name for name in index if name.startswith("text_encoder")]:
        index[name] = [None, None]
        shutil.rmtree(model / name)
    (model / "model_index.json").write_text(json.dumps(index))
    values = values_for(tmp_path, folder / "source")
    values["model"]["base"] = str(model)
    with pytest.raises(BadData, match=r"has no text encoder; prepare.text: none leaves"):
        run(check_recipe(values, "r"))
    values["prepare"]["text"] = "none"
    assert run(check_recipe(values, "r")).num_samples == 20


def test_a_text_encoder_that_is_named_but_not_there_is_what_is_said(folder, tmp_path):
    model = tmp_path / "model"
    shutil.copytree(MODELS["tiny"], model, ignore=shutil.ignore_patterns("text_encoder"))
    values = values_for(tmp_path, folder / "source")
    values["model"]["base"] = str(model)
    with pytest.raises(BadData, match="there is no text_encoder/ in this pipeline folder"):
        run(check_recipe(values, "r"))
    values["prepare"]["text"] = "none"
    assert run(check_recipe(values, "r")).num_samples == 20


def test_a_vae_that_makes_nan_is_named_with_the_picture(folder, tmp_path):
    recipe = recipe_for(tmp_path, folder / "source")
    job = prepare_job(recipe)
    job.maker.encode_latents = lambda images: torch.full((len(images), 4, 2, 2), float("nan"))
    with pytest.raises(BadData, match=r"source/0\d\d.png: latent holds values that are not finite"):
        prepare(job, Share(), overwrite=False)
    assert not shards(tmp_path / "out")
    job.maker.encode_latents = lambda images: torch.full((len(images), 4, 2, 2), 7e4)
    with pytest.raises(BadData, match=r"more than float16 can hold.*\n.*float32, bfloat16"):
        prepare(job, Share(), overwrite=False)


@pytest.mark.parametrize("part", ["encode_latents", "encode_prompt"])
@pytest.mark.parametrize(
    "error", [torch.OutOfMemoryError("CUDA"), RuntimeError("CPU: can't allocate memory")]
)
def test_too_large_a_batch_says_what_to_change(part, error, folder, tmp_path):
    recipe = recipe_for(tmp_path, folder / "source")
    job = prepare_job(recipe)

    def fail(*arguments):
        raise error

    job.encoders.family = replace(job.encoders.family, **{part: fail})
    with pytest.raises(Unavailable, match=r"at once do not fit into .* smaller prepare\.batch"):
        prepare(job, Share(), overwrite=False)
    job.encoders.family = replace(job.encoders.family, **{part: lambda *a: 1 / 0})
    with pytest.raises(ZeroDivisionError):
        prepare(job, Share(), overwrite=False)


def test_an_embedding_that_is_not_finite_is_named_with_its_caption(folder, tmp_path):
    job = prepare_job(recipe_for(tmp_path, folder / "source"))
    job.maker.encode_texts = lambda prompts: [{"hidden": torch.full((2, 2), float("inf"))}] * 8
    with pytest.raises(BadData, match=r"caption 'a .* disc on .*': hidden holds values"):
        prepare(job, Share(), overwrite=False)


def test_a_disk_that_is_too_small_is_said_before_anything_is_written(folder, tmp_path, monkeypatch):
    monkeypatch.setattr(prepare_job_module, "free_bytes", lambda path: 1000)
    with pytest.raises(CannotWrite, match=r"will take about .* KiB, but only 1000 bytes are free"):
        run(recipe_for(tmp_path, folder / "source"))
    assert sorted(tmp_path.iterdir()) == []


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_an_unwritable_place_is_said_so(folder, tmp_path):
    tmp_path.chmod(0o500)
    try:
        with pytest.raises(CannotWrite, match="cannot write here"):
            run(recipe_for(tmp_path, folder / "source"))
    finally:
        tmp_path.chmod(0o700)


def test_a_file_in_the_place_of_a_folder_is_said_so(folder, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(CannotWrite, match="cannot write here"):
        run(recipe_for(tmp_path, folder / "source", out=str(tmp_path / "file" / "out")))
    with pytest.raises(CannotWrite, match="cannot write here"):
        run(recipe_for(tmp_path, folder / "source", out=str(tmp_path / "file")))


# ---- what is said ----------------------------------------------------------------------------


def test_rejects_are_counted_by_reason_and_named(tmp_path):
    source = make_folder(tmp_path / "source", 12)
    (source / "long.png").write_bytes(encoded(draw(90, 99, 33)))
    (source / "small.png").write_bytes(encoded(draw(91, 20, 20)))
    (source / "broken.jpg").write_bytes(encoded(draw(92), "JPEG")[:-50])
    (source / "film.gif").write_bytes(b"GIF89a")
    report = run(recipe_for(tmp_path))
    assert report.rejected == {
        "too elongated": 1,
        "too small": 1,
        "image cannot be decoded": 1,
        "not a JPEG, PNG or WebP image": 1,
    }
    named = {Path(line["sample"]).stem: line["reason"] for line in rejected(tmp_path / "out")}
    assert named == {
        "long": "too elongated",
        "small": "too small",
        "broken": "image cannot be decoded",
        "film": "not a JPEG, PNG or WebP image",
    }
    assert report.num_samples == 12 == sum(report.buckets.values())
    assert any("left out: " in line for line in describe_preparation(report))


def test_pictures_that_metadata_does_not_name_are_rejects_by_name(tmp_path):
    source = make_folder(tmp_path / "source", 6, captions=False)
    (source / "metadata.csv").write_text("file_name,text\n001.png,one\n002.png,two\n")
    report = run(recipe_for(tmp_path))
    assert report.rejected == {"not in the metadata": 4}
    names = [Path(fault["sample"]).name for fault in rejected(tmp_path / "out")]
    assert names == ["000.png", "003.png", "004.png", "005.png"]


def test_a_key_that_comes_twice_counts_once(tmp_path):
    one, two = make_folder(tmp_path / "one", 3), make_folder(tmp_path / "two", 4)
    report = run(recipe_for(tmp_path, [one, two]))
    assert (report.num_samples, report.rejected) == (4, {"duplicate key": 3})
    assert rejected(tmp_path / "out")[0]["detail"].startswith(f"also {one}")


def test_the_manifest_is_whole_and_says_what_was_made(folder):
    out = folder / "out"
    assert check_manifest(out) == []
    manifest = read_manifest(out)
    assert manifest.kind == "shards"
    assert manifest.facts["plan"]["shard_samples"] == 8
    assert manifest.facts["report"]["num_samples"] == 20
    names = {path.name for path in out.iterdir()} - {"manifest.json"}
    assert manifest.files.keys() == names
    assert {"prepare-report.html", "contact-sheet.png", "rejected.jsonl"} <= names


def test_the_estimate_is_within_a_tenth_of_what_is_written(tmp_path):
    """300 pictures of many sizes, half of them noise, with one caption or several."""
    source = tmp_path / "source"
    source.mkdir()
    dice = np.random.default_rng(0)
    for number in range(300):
        width, height = dice.integers(40, 160, 2)
        picture = draw(number, width, height)
        if number % 2:
            noise = dice.integers(-60, 60, picture.shape)
            picture = (picture + noise).clip(0, 255).astype(np.uint8)
        (source / f"{number:03d}.jpg").write_bytes(encoded(picture, "JPEG", quality=95))
        lines = ["a red disc on blue with letter A"] * (1 + number % 3)
        (source / f"{number:03d}.txt").write_text("\n".join(lines))
    data = {"resize": {"sides": [32, 64], "max_aspect": 1.6}, "caption": {"lines": True}}
    recipe = recipe_for(tmp_path, data=data, shard_samples=100)
    found = estimate_prepare(recipe)
    assert not (tmp_path / "out").exists() and not (tmp_path / "out.unfinished").exists()
    report = run(recipe)
    written = sum(len(d) for n, d in content(tmp_path / "out").items() if n.startswith("0000"))
    assert found.num_pictures == 300
    assert abs(found.total / written - 1) < 0.1
    assert abs(sum(found.bytes_per_sample.values()) / found.per_sample - 1) < 1e-9
    assert report.num_samples < 240  # many are left out, which the estimate knew


def test_samples_per_shard_follow_from_their_weight(folder, tmp_path):
    found = estimate_prepare(recipe_for(tmp_path, folder / "source"))
    each = round(found.per_sample * 6)
    recipe = recipe_for(tmp_path, folder / "source", shard_samples=None, shard_bytes=each)
    report = run(recipe)
    assert report.num_shards == 4  # 6, 6, 6, 2
    with pytest.raises(CannotWrite, match=f"made with shard_bytes {each}, now 5"):
        run(recipe_for(tmp_path, folder / "source", shard_samples=None, shard_bytes=5))


def test_nothing_is_estimated_from_pictures_that_all_fail(tmp_path, monkeypatch):
    """Not more are looked at than it takes."""
    monkeypatch.setattr(prepare_job_module, "MOST_LOOKED_AT", 8)
    make_folder(tmp_path / "source", 12)
    job = prepare_job(recipe_for(tmp_path, data={"resize": {"sides": [128]}}))
    with pytest.raises(BadData, match="none of 8 pictures can be used"):
        job.estimate(4)


# ---- the command line ------------------------------------------------------------------------


@pytest.fixture
def recipe_file(folder, tmp_path):
    path = tmp_path / "recipe.yaml"
    path.write_text(yaml.safe_dump(values_for(tmp_path, folder / "source")))
    return path


def command(*arguments):
    return CliRunner().invoke(app, ["prepare", *map(str, arguments)])


def test_the_command_says_what_it_wrote_and_what_comes_next(recipe_file, tmp_path):
    first = command(recipe_file, "--shard-index", 1, "--num-shards", 2)
    assert first.exit_code == 0
    assert "this task made 1 of 3 shards; 2 are still to come; whoever makes" in first.output
    assert "next:" not in first.output
    last = command(recipe_file, "--shard-index", 0, "--num-shards", 2)
    assert f"wrote {tmp_path}/out: 20 samples in 3 shards" in last.output
    assert f"next: set data.train to {tmp_path}/out (it is unused), then asymlift" in last.output
    again = command(recipe_file, "--set", f"data.train=[{tmp_path}/out]").output
    assert "already there: " in again
    following = f"asymlift fit-basis {recipe_file} --set 'data.train=[{tmp_path}/out]'"
    assert f"next: {following}" in again


def test_what_is_easily_overlooked_is_said(tmp_path):
    """Captions that do not lie where they are looked for, and sizes that are too large."""
    make_folder(tmp_path / "source", 3)
    make_folder(tmp_path / "source" / "more", 12, captions=False)
    for number in range(2):
        (tmp_path / "source" / f"small{number}.png").write_bytes(encoded(draw(number, 20, 20)))
    path = tmp_path / "recipe.yaml"
    path.write_text(yaml.safe_dump(values_for(tmp_path, shard_samples=20)))
    advice = "data.resize.sides: [32, 16] would keep 2 of 2"
    estimate = command(path, "--estimate").output
    assert "left out of these: too small 2" in estimate and advice in estimate
    made = command(path).output
    assert f"15 of 17 that were looked at can be used; {advice}" in made
    assert "15 samples in 1 shard, " in made and "12 of 15 have no caption" in made
    assert made.count(advice) == 2
    assert advice in (tmp_path / "out" / "prepare-report.html").read_text()
    again = command(path).output
    assert "12 of 15 have no caption" in again and advice in again


def test_a_dry_run_and_an_estimate_leave_nothing_beside_shards(tmp_path, monkeypatch):
    monkeypatch.setenv("ASYMLIFT_CACHE", str(tmp_path / "cache"))
    web = {f"{n}.png": encoded(draw(n)) for n in range(3)}
    (tmp_path / "source").mkdir()
    raw_tar(tmp_path / "source" / "web.tar", list(web.items()))
    path = tmp_path / "recipe.yaml"
    path.write_text(yaml.safe_dump(values_for(tmp_path)))
    assert "pictures: 3" in command(path, "--dry-run").output
    assert "3 pictures; of 3 looked at, 3 can be used" in command(path, "--estimate").output
    assert [found.name for found in (tmp_path / "source").iterdir()] == ["web.tar"]


def test_classes_that_nobody_gave_are_asked_for(tmp_path):
    make_folder(tmp_path / "source", 2)
    recipe = recipe_for(tmp_path, data={**RESIZE, "caption": {"source": "class"}})
    with pytest.raises(BadData, match=r"no class label: 2\)[^$]*data\.caption\.labels says where"):
        run(recipe)


def test_labels_and_new_latents_miss_no_captions(folder, tmp_path):
    make_folder(tmp_path / "source" / "one", 4, captions=False)
    labels = {**RESIZE, "caption": {"labels": "folder", "source": "class"}}
    assert run(recipe_for(tmp_path, data=labels)).num_without_caption == 0
    newer = tmp_path / "newer"
    report = run(recipe_for(newer, folder / "out", data={}, image="none", text="none"))
    assert report.num_without_caption == 0


@pytest.mark.parametrize(
    ("data", "settings", "following"),
    [
        ({"train": "OUT"}, {}, "asymlift fit-basis r.yaml"),
        ({"train": ["gone", "OUT/*.tar"]}, {}, "asymlift fit-basis r.yaml"),
        ({"validation": "OUT/{000000..000001}.tar"}, {}, "asymlift fit-basis r.yaml"),
        ({}, {}, "set data.train to OUT (it is unused), then asymlift fit-basis r.yaml"),
        (
            {"train": "OUT"},
            {"image": "none"},
            "set data.cache to OUT (it is None), then asymlift fit-basis r.yaml",
        ),
        ({"cache": "OUT"}, {"image": "none"}, "asymlift fit-basis r.yaml"),
    ],
)
def test_what_comes_next_is_what_the_recipe_reads(data, settings, following, folder):
    out = str(folder / "out")
    filled = yaml.safe_load(yaml.safe_dump(data).replace("OUT", out))
    recipe = recipe_for(folder, data={**RESIZE, "train": "unused", **filled}, **settings)
    assert after_prepare(recipe, "asymlift fit-basis r.yaml") == following.replace("OUT", out)


def test_json_of_every_form(recipe_file, tmp_path):
    dry = json.loads(command(recipe_file, "--dry-run", "--json").stdout)
    assert dry["checks"]["pictures"] == 20
    assert dry["checks"]["would write"] == str(tmp_path / "out")
    assert dry["recipe"]["prepare"]["latents"] == "float16"
    estimate = json.loads(command(recipe_file, "--estimate", "--json").stdout)
    assert estimate["num_pictures"] == 20 and estimate["total"] > 0
    assert sorted(path.name for path in tmp_path.iterdir()) == ["recipe.yaml"]
    part = json.loads(command(recipe_file, "--json", "--shard-index", 0, "--num-shards", 2).stdout)
    assert (part["complete"], part["num_made"], part["num_missing"]) == (False, 2, 1)
    report = json.loads(command(recipe_file, "--json").stdout)
    assert (report["complete"], report["num_samples"]) == (True, 20)
    refused = command(recipe_file, "--json", "--set", "prepare.batch=3")
    assert json.loads(refused.stdout)["exit"] == refused.exit_code == 73


def test_dry_run_and_estimate_in_words(recipe_file, tmp_path):
    dry = command(recipe_file, "--dry-run").output
    assert "pictures: 20" in dry and "multiples of 8 pixels" in dry
    estimate = command(recipe_file, "--estimate").output
    assert "20 pictures; of 20 looked at, 20 can be used" in estimate
    assert "a sample takes" in estimate and "are free" in estimate
    assert sorted(path.name for path in tmp_path.iterdir()) == ["recipe.yaml"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--shard-index", 1], "--shard-index and --num-shards belong together"),
        (["--shard-index", 2, "--num-shards", 2], "must be from 0 to 1"),
        (["--shard-index", -1, "--num-shards", 2], "must be from 0 to 1"),
    ],
)
def test_wrong_shares_are_refused(options, message, recipe_file):
    result = command(recipe_file, *options)
    assert result.exit_code == 78 and message in result.output


@pytest.fixture
def started_alone(monkeypatch):
    """A finetune in this process leaves these behind."""
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.delenv(name, raising=False)


def test_a_launcher_gives_each_rank_its_share(started_alone, monkeypatch):
    assert share_for(None, None) == Share(0, 1)
    assert share_for(3, 5) == Share(3, 5)
    for name, value in (("RANK", "1"), ("WORLD_SIZE", "2"), ("LOCAL_RANK", "1")):
        monkeypatch.setenv(name, value)
    assert share_for(None, None) == Share(1, 2, together=True)


def test_tasks_of_srun_share_the_work_and_one_of_them_speaks(
    folder, recipe_file, tmp_path, started_alone, monkeypatch
):
    monkeypatch.setenv("SLURM_STEP_NUM_TASKS", "2")
    monkeypatch.setenv("SLURM_PROCID", "1")
    monkeypatch.setenv("SLURM_LOCALID", "0")
    other = command(recipe_file, "--json")
    assert (other.exit_code, other.stdout) == (0, "")
    monkeypatch.setenv("SLURM_PROCID", "0")
    first = command(recipe_file, "--json")
    assert json.loads(first.stdout)["num_samples"] == 20
    assert content(tmp_path / "out") == content(folder / "out")


def test_a_share_that_is_given_counts_more_than_the_launcher(
    recipe_file, started_alone, monkeypatch
):
    monkeypatch.setenv("SLURM_STEP_NUM_TASKS", "2")
    monkeypatch.setenv("SLURM_PROCID", "0")
    monkeypatch.setenv("SLURM_LOCALID", "0")
    part = command(recipe_file, "--json", "--shard-index", 1, "--num-shards", 3)
    assert json.loads(part.stdout)["num_made"] == 1


# ---- other processes -------------------------------------------------------------------------


def start(recipe_file, *arguments, launch=(sys.executable, "-m")):
    return subprocess.Popen(
        [*launch, "asymlift", "prepare", str(recipe_file), *arguments],
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": str(torch.get_num_threads())},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


@pytest.mark.parametrize(
    ("number", "exit_code", "message"),
    [(signal.SIGTERM, 75, "stopped by SIGTERM"), (signal.SIGINT, 130, "stopped by Ctrl-C")],
)
def test_a_signal_stops_and_the_same_command_goes_on(number, exit_code, message, tmp_path):
    make_folder(tmp_path / "source", 150)
    path = tmp_path / "recipe.yaml"
    path.write_text(yaml.safe_dump(values_for(tmp_path, shard_samples=4)))
    process = start(path)
    while process.poll() is None and len(list((tmp_path / "out").glob("*.index.*"))) < 2:
        time.sleep(0.005)
    process.send_signal(number)
    _, said = process.communicate(timeout=60)
    assert process.returncode == exit_code, said
    assert message in said and "run " in said and "Traceback" not in said
    kept = {p: p.stat().st_ino for p in (tmp_path / "out").glob("[0-9]*.tar")}
    assert 2 <= len(kept) < 38
    assert not list((tmp_path / "out").glob(".*"))
    report = run(recipe_for(tmp_path, shard_samples=4))
    assert report.num_samples == 150
    indexed = [p for p in kept if p.stat().st_ino == kept[p]]
    assert len(indexed) >= len(kept) - 1  # the last one may have had no index yet


def test_two_ranks_of_torchrun_share_the_work(folder, recipe_file, tmp_path):
    launch = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node=2", "--standalone"]
    process = start(recipe_file, "--json", launch=[*launch, "-m"])
    out, said = process.communicate(timeout=120)
    assert process.returncode == 0, said
    assert json.loads(out)["num_samples"] == 20  # one document: only the first rank speaks
    assert content(tmp_path / "out") == content(folder / "out")


def test_a_family_of_heavy_embeddings_says_how_to_do_without_them(tmp_path, capfd):
    make_folder(tmp_path / "source", 6)
    for text, is_said in (("none", False), ("bfloat16", True)):
        job = prepare_job(recipe_for(tmp_path, text=text))
        job.encoders.family = replace(job.encoders.family, heavy_text="9 MB a word")
        job.per_shard()
        said = "flux2 has heavy embeddings (9 MB a word); with `prepare.text: none`"
        assert (said in capfd.readouterr().err) == is_said
