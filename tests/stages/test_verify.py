"""`verify` says what a thing is, whether it is whole, and what cannot be known."""

import os

import pytest
import torch

from asymlift.artifacts.manifest import write_manifest
from asymlift.artifacts.safetensors_stream import load_tensors, save_tensors
from asymlift.data.table import index_path, load_table
from asymlift.data.writer import Packed, write_shard
from asymlift.errors import BadData
from asymlift.maths.basis import random_basis
from asymlift.stages.convert import convert
from asymlift.stages.verify import verify
from tests.data.small_shards import PNG, flip, make_sample, overwrite, raw_tar
from tests.reliability.fake_pipeline import SECOND, fake_plan, write_basis


@pytest.fixture
def plan(tmp_path):
    plan = fake_plan(tmp_path)
    convert(plan)
    return plan


def test_a_basis_is_described(plan):
    verdict = verify(plan.basis)
    assert verdict.ok
    assert (verdict.kind, verdict.facts) == (
        "basis",
        ["rank 8 of 48, patches of 4 pixels, s = 0.7"],
    )


def test_a_published_basis_says_what_cannot_be_known(plan):
    A = random_basis(48, 8, torch.Generator()).float().contiguous()
    save_tensors(plan.basis, {"proj_mat_p4": A, "scale_p4": torch.tensor(1.0)})
    verdict = verify(plan.basis)
    assert verdict.ok
    assert "carries no checksum" in verdict.facts[1]
    assert "does not say the model family" in verdict.facts[2]


def test_a_broken_basis_has_a_problem_and_no_traceback(plan):
    plan.basis.write_bytes(plan.basis.read_bytes()[:-1])
    verdict = verify(plan.basis)
    assert not verdict.ok
    assert "cut short" in verdict.problems[0]


def test_a_lifted_folder_is_whole_or_its_files_are_named(plan):
    assert verify(plan.output).ok
    assert verify(plan.output).kind == "lifted"
    shard = next((plan.output / "transformer").glob("*00002*"))
    shard.unlink()
    (plan.output / "transformer/extra").touch()
    problems = " ".join(verify(plan.output).problems)
    assert f"transformer/{shard.name}: missing" in problems
    assert "transformer/extra: not in the manifest" in problems


def test_a_lifted_folder_without_manifest_is_not_whole(plan):
    (plan.output / "manifest.json").unlink()
    verdict = verify(plan.output)
    assert not verdict.ok
    assert "no manifest.json" in verdict.problems[0]


def test_every_network_that_was_lifted_is_read(tmp_path):
    plan = fake_plan(tmp_path, second=True)
    convert(plan)
    assert verify(plan.output).ok
    path = plan.output / SECOND / "diffusion_pytorch_model.safetensors"
    tensors = load_tensors(path)
    tensors["proj_out.weight"][0, 0] = torch.nan
    save_tensors(path, tensors)
    problems = verify(plan.output).problems
    assert f"{SECOND}/{path.name}: proj_out.weight holds NaN or infinity" in problems


def test_nan_is_found_even_under_a_right_checksum(tmp_path):
    save_tensors(tmp_path / "ema.safetensors", {"a": torch.ones(2), "b": torch.tensor([torch.nan])})
    write_manifest(tmp_path, kind="checkpoint", facts={"step": 1})
    verdict = verify(tmp_path)
    assert verdict.kind == "checkpoint"
    assert verdict.problems == ["ema.safetensors: b holds NaN or infinity"]


def test_a_run_is_verified_part_by_part(plan):
    run = plan.output.parent
    write_basis(run / "basis.safetensors", plan.base)
    for step in ("step-000001", "step-000002"):
        (run / "checkpoints" / step).mkdir(parents=True)
        write_manifest(run / "checkpoints" / step, kind="checkpoint", facts={})
    assert verify(run).ok
    assert len(verify(run).facts) == 4
    (run / "checkpoints/step-000002/extra").touch()
    assert verify(run).problems == ["checkpoints/step-000002: extra: not in the manifest"]


def test_what_asymlift_did_not_make_is_bad_data(plan, tmp_path):
    (tmp_path / "empty").mkdir()
    (tmp_path / "notes.txt").touch()
    for path, message in (
        (tmp_path / "nowhere", "no such file or folder"),
        (tmp_path / "empty", "the folder is empty"),
        (tmp_path / "notes.txt", "neither a basis"),
        (plan.base, "a diffusers folder without manifest"),
        (plan.base / "vae", "nothing that asymlift made"),
    ):
        with pytest.raises(BadData, match=message):
            verify(path)


# ---- shards --------------------------------------------------------------------------------------


@pytest.fixture
def shards(tmp_path):
    for name in range(2):
        samples = (make_sample(3 * name + n) for n in range(3))
        write_shard(tmp_path / f"{name}.tar", samples, made={"vae": "sha256:0"})
    return tmp_path


def test_a_shard_with_its_index_is_whole(shards):
    verdict = verify(shards / "0.tar")
    assert verdict.ok
    assert (verdict.kind, verdict.facts) == ("shard", ["3 samples read"])


def test_a_shard_of_others_is_read_sample_by_sample(tmp_path):
    path = raw_tar(tmp_path / "a.tar", [("a.png", PNG), ("b.png", PNG), ("b.txt", b"x")])
    verdict = verify(path)
    assert verdict.ok
    assert verdict.facts[0] == "2 samples read"
    assert "no checksum" in verdict.facts[1]
    overwrite(path, 512, b"<html>")
    assert verify(path).problems == [f"{path}!a: not a JPEG, PNG or WebP image"]
    path.write_bytes(path.read_bytes()[:700])
    assert "shard is cut off" in verify(path).problems[0]
    path.write_text("<html>")
    assert "not a tar" in verify(path).problems[0]
    assert verify(path).facts[0] == "0 samples read, 1 lost"


def test_a_byte_that_changed_is_found_wherever_it_is(shards):
    path = shards / "0.tar"
    table = load_table(path, index_path(path))
    part = table.record(1).parts[".text.safetensors"]
    flip(path, part.offset + part.size - 1)
    assert verify(path).problems == [
        f"{path}: its bytes have changed (sha256 differs)",
        f"{path}!000001: changed since it was indexed (.text.safetensors)",
    ]
    assert verify(path).facts == ["2 samples read, 1 lost"]
    flip(path, part.offset + part.size - 1)
    flip(path, part.offset + part.size)  # padding, which no sample has
    assert verify(path).problems == [f"{path}: its bytes have changed (sha256 differs)"]


def test_the_embedding_of_another_caption_is_checked_too(tmp_path):
    members = {".png": PNG, ".text1.safetensors": b"x" * 100}
    path = tmp_path / "a.tar"
    part = write_shard(path, [Packed("a", members, 8, 8)]).record(0).parts[".text1.safetensors"]
    flip(path, part.offset)
    assert f"{path}!a: changed since it was indexed (.text1.safetensors)" in verify(path).problems


def test_a_shard_of_another_length_than_its_index_says(shards):
    path = shards / "0.tar"
    size = path.stat().st_size
    os.truncate(path, size // 2)
    verdict = verify(path)
    said = f"({size // 2} bytes, written with {size})"
    assert verdict.problems == [f"{path}: shard is cut off {said}"]
    assert verdict.facts == ["1 samples read, 2 lost"]


def test_a_damaged_index_is_a_problem_of_a_sound_shard(shards):
    index = index_path(shards / "0.tar")
    flip(index, index.stat().st_size - 1)
    verdict = verify(shards / "0.tar")
    assert verdict.problems == [f"{index}: damaged, so 0.tar was read without it"]
    assert verdict.facts[0] == "3 samples read"


def test_a_folder_of_shards_is_verified_shard_by_shard(shards):
    verdict = verify(shards)
    assert verdict.ok
    assert (verdict.kind, verdict.facts) == (
        "shards",
        ["2 shards", "0.tar: 3 samples read", "1.tar: 3 samples read"],
    )
    flip(shards / "1.tar", 0)
    assert verify(shards).problems == [f"{shards}/1.tar: its bytes have changed (sha256 differs)"]


def test_a_folder_of_shards_with_a_manifest_is_checked_against_it(shards):
    write_manifest(shards, kind="shards", facts={})
    verdict = verify(shards)
    assert verdict.ok
    assert (verdict.kind, verdict.facts[0].partition(",")[0]) == ("shards", "4 files")
    flip(shards / "1.tar", 0)
    (shards / "0.index.safetensors").unlink()
    assert verify(shards).problems == [
        "0.index.safetensors: missing",
        "1.tar: its bytes have changed (sha256 differs)",
    ]
