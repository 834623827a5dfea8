"""What there is to prepare is cut in the same way on every machine, and other work is refused."""

import json
import os

import pytest

from asymlift.data.catalog import listed
from asymlift.errors import BadData, CannotWrite
from asymlift.stages.prepare.work import (
    Layout,
    Work,
    agreed_layout,
    find_work,
    plan_for,
    plan_path,
    refuse_others,
)
from tests.stages.prepare.small_prepare import make_folder, recipe_for


@pytest.fixture
def work(tmp_path):
    return Work([listed(make_folder(tmp_path / "source"), measure=False)])


def keys(work):
    return [work.record(place).key for place in range(len(work))]


def test_the_order_is_of_hashes_and_the_same_wherever_the_source_lies(work, tmp_path):
    assert sorted(keys(work)) == [f"{number:03d}" for number in range(20)]
    assert keys(work) != sorted(keys(work))
    elsewhere = Work([listed(make_folder(tmp_path / "else" / "where"), measure=False)])
    assert keys(elsewhere) == keys(work)
    assert elsewhere.digest() == work.digest()


def test_a_picture_more_moves_no_other_past_its_neighbours(work, tmp_path):
    more = Work([listed(make_folder(tmp_path / "more", 21), measure=False)])
    assert [key for key in keys(more) if key != "020"] == keys(work)


def test_the_order_of_sources_decides_nothing_but_who_keeps_a_key(tmp_path):
    one = listed(make_folder(tmp_path / "one", 3), measure=False)
    two = listed(make_folder(tmp_path / "two", 5), measure=False)
    forth, back = Work([one, two]), Work([two, one])
    assert keys(forth) == keys(back)
    assert {fault.where.split("/")[-2] for fault in forth.faults} == {"two"}
    assert {fault.where.split("/")[-2] for fault in back.faults} == {"one"}
    assert [fault.reason for fault in forth.faults] == ["duplicate key"] * 3


@pytest.mark.parametrize("change", ["caption", "picture", "key"])
def test_the_digest_sees_other_sizes_and_other_keys(change, work, tmp_path):
    other = make_folder(tmp_path / "other")
    if change == "caption":
        (other / "004.txt").write_text("longer than before, by far")
    elif change == "picture":
        with (other / "004.png").open("ab") as file:
            file.write(b"\0")
    else:
        (other / "004.png").rename(other / "4.png")
        (other / "004.txt").rename(other / "4.txt")
    assert Work([listed(other, measure=False)]).digest() != work.digest()


@pytest.mark.parametrize(("samples", "per_shard", "sizes"), [(20, 8, [8, 8, 4]), (16, 8, [8, 8])])
def test_a_layout_covers_every_sample_once(samples, per_shard, sizes):
    layout = Layout(samples, per_shard)
    places = [layout.places(number) for number in range(layout.num_shards)]
    assert [len(some) for some in places] == sizes
    assert [place for some in places for place in some] == list(range(samples))


def test_of_two_that_plan_at_once_the_first_one_counts(work, tmp_path):
    out, plan = tmp_path / "out", plan_for({"image": "png"}, work)

    def while_another_is_faster():
        assert agreed_layout(out, plan, lambda: 5) == Layout(20, 5)
        return 9

    assert agreed_layout(out, plan, while_another_is_faster) == Layout(20, 5)
    assert agreed_layout(out, plan, lambda: pytest.fail("weighed again")) == Layout(20, 5)
    assert [path.name for path in plan_path(out).parent.iterdir()] == ["plan.json"]


def test_a_file_system_without_hard_links_will_do(work, tmp_path, monkeypatch):
    def refuse(*arguments, **named):
        raise PermissionError(1, "not here")

    monkeypatch.setattr(os, "link", refuse)
    assert agreed_layout(tmp_path / "out", plan_for({}, work), lambda: 5) == Layout(20, 5)
    assert [path.name for path in plan_path(tmp_path / "out").parent.iterdir()] == ["plan.json"]


@pytest.mark.parametrize("text", ["", "{", "[]", "null", '{"per_shard": null}', "{}"])
def test_a_damaged_plan_is_named(text, work, tmp_path):
    out = tmp_path / "out"
    agreed_layout(out, plan_for({}, work), lambda: 5)
    plan_path(out).write_text(text)
    with pytest.raises(BadData, match=r"plan\.json: damaged; --overwrite begins anew"):
        agreed_layout(out, plan_for({}, work), lambda: 5)


def test_the_first_difference_is_said_with_both_values(tmp_path):
    found = json.loads('{"vae": "sha256:1", "batch": 8, "listing": "sha256:a"}')
    refuse_others(tmp_path, found, {"vae": "sha256:1", "batch": 8})
    with pytest.raises(CannotWrite, match=r"made with batch 8, now 4\.\n--overwrite"):
        refuse_others(tmp_path, found, {"vae": "sha256:1", "batch": 4})
    with pytest.raises(CannotWrite, match="made with text None, now float8"):
        refuse_others(tmp_path, found, {"text": "float8"})
    with pytest.raises(
        CannotWrite, match="with other pictures or captions, sha256:a, now sha256:b"
    ):
        refuse_others(tmp_path, found, {"listing": "sha256:b"})


def test_nothing_to_prepare_names_the_first_faults(tmp_path):
    (tmp_path / "source").mkdir()
    for number in range(5):
        (tmp_path / "source" / f"{number}.tar").write_bytes(b"no tar at all")
    with pytest.raises(BadData) as caught:
        find_work(recipe_for(tmp_path))
    lines = str(caught.value).splitlines()
    assert lines[0].endswith("source: nothing to prepare") and len(lines) == 4
