"""`verify` says what a thing is, whether it is whole, and what cannot be known."""

import shutil

import pytest
import torch

from asymlift.artifacts.manifest import write_manifest
from asymlift.artifacts.safetensors_stream import save_tensors
from asymlift.errors import BadData
from asymlift.maths.basis import random_basis
from asymlift.stages.convert import convert
from asymlift.stages.verify import verify
from tests.reliability.fake_pipeline import fake_plan, write_basis


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


def test_a_shard_is_read_sample_by_sample(tmp_path):
    from asymlift.data.pictures import encode_png
    from asymlift.data.shards import Sample, write_shard

    image = torch.zeros(3, 8, 8, dtype=torch.uint8)
    samples = [Sample(f"{n:05d}", image, "a square", {}, None, None) for n in range(3)]
    path = tmp_path / "000000.tar"
    write_shard(path, samples)
    verdict = verify(path)
    assert verdict.ok
    assert verdict.facts[0] == "3 samples read"
    assert "no checksum" in verdict.facts[1]

    data = path.read_bytes()
    png = encode_png(image)
    path.write_bytes(data.replace(png, b"\0" * len(png), 1))
    assert "00000" in verify(path).problems[0]
    path.write_bytes(data[:700])
    assert not verify(path).ok
    shutil.copy(path, tmp_path / "html.tar")
    (tmp_path / "html.tar").write_text("<html>")
    assert not verify(tmp_path / "html.tar").ok
