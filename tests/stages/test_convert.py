"""Convert changes two maps, keeps every other byte, and refuses what does not belong together."""

import contextlib
import dataclasses
import errno
import functools
import json
import os
import re
import shutil
import sys
from pathlib import Path

import pytest
import safetensors.torch
import torch

from asymlift.artifacts import files
from asymlift.artifacts.diffusers_folder import DiffusersFolder
from asymlift.artifacts.lifted_folder import read_lifted
from asymlift.artifacts.manifest import check_manifest
from asymlift.artifacts.safetensors_stream import save_tensors
from asymlift.errors import BadData, CannotWrite, Unavailable
from asymlift.families import FAMILIES
from asymlift.maths.basis import random_basis
from asymlift.maths.color import ColorCode
from asymlift.model import loading
from asymlift.runtime import third_party
from asymlift.stages import self_check
from asymlift.stages.convert import SLACK, convert
from asymlift.stages.self_check import COUPLING_TOLERANCE
from tests import tiny
from tests.families.case import case_of
from tests.reliability.fake_pipeline import (
    INNER,
    SECOND,
    D,
    d,
    fake_plan,
    snapshot,
    transformer_tensors,
    write_base,
    write_basis,
)

INDEX = "diffusion_pytorch_model.safetensors.index.json"


@pytest.fixture
def plan(tmp_path):
    return fake_plan(tmp_path)


def tensors_of(folder, component="transformer"):
    found = {}
    for path in DiffusersFolder(folder).weight_files(component):
        found |= safetensors.torch.load_file(path)
    return found


def space_needed(plan, monkeypatch):
    """In bytes, as the refusal says it."""
    with monkeypatch.context() as patch, pytest.raises(CannotWrite, match="needs") as error:
        patch.setattr("asymlift.stages.convert.human_bytes", str)
        patch.setattr("asymlift.stages.convert.free_bytes", lambda path: 0)
        convert(plan)
    return int(re.search(r"needs (\d+)", str(error.value))[1])


# -- what it does


@pytest.mark.parametrize("shards", [1, 3])
def test_two_maps_change_and_every_other_tensor_keeps_its_bits(shards, tmp_path):
    plan = fake_plan(tmp_path, shards=shards)
    report = convert(plan)
    old, new = transformer_tensors(0), tensors_of(plan.output)

    assert new.keys() == old.keys()
    for name in old.keys() - {"x_embedder.weight", "proj_out.weight"}:
        assert new[name].dtype == torch.bfloat16
        assert torch.equal(new[name], old[name])
    A = random_basis(D, d, torch.Generator().manual_seed(0)).float().double()
    first, last = new["x_embedder.weight"], new["proj_out.weight"]
    assert (first.dtype, last.dtype) == (torch.float32, torch.float32)
    assert torch.equal(first, (old["x_embedder.weight"].double() @ A.T).float())
    assert torch.equal(last, (A @ old["proj_out.weight"].double()).float())
    assert report.written == min(shards, 2)
    assert max(dataclasses.astuple(report.maps)) < 1e-7


def test_all_else_is_the_base_its_weights_linked(plan):
    report = convert(plan)
    changed = {
        "manifest.json",
        "transformer/asymlift.json",
        "transformer/asymlift.safetensors",
        "transformer/config.json",
        f"transformer/{INDEX}",
        "transformer/diffusion_pytorch_model-00001-of-00003.safetensors",
        "transformer/diffusion_pytorch_model-00003-of-00003.safetensors",
    }
    base, lifted = snapshot(plan.base), snapshot(plan.output)
    assert lifted.keys() - changed == base.keys() - changed
    for name in lifted.keys() - changed:
        assert lifted[name] == base[name]
        linked = name.endswith(".safetensors")
        assert (plan.output / name).samefile(plan.base / name) == linked
    assert report.linked == 3  # VAE, text encoder, the shard of no map
    assert report.license == "other, a-license"


def test_editing_the_lifted_folder_leaves_the_base_alone(plan):
    before = snapshot(plan.base)
    convert(plan)
    edited = [p for p in plan.output.rglob("*") if p.is_file() and p.suffix != ".safetensors"]
    for path in edited:
        with path.open("ab") as file:  # the same file, not another in its place
            file.write(b"edited")
    assert plan.output / "model_index.json" in edited
    assert plan.output / "README.md" in edited
    assert snapshot(plan.base) == before


def test_where_links_are_impossible_files_are_copied(plan, monkeypatch):
    convert(plan)
    linked = snapshot(plan.output)

    def no_links(self, target):
        raise OSError(errno.EXDEV, "Invalid cross-device link")

    monkeypatch.setattr(Path, "hardlink_to", no_links)
    other = dataclasses.replace(plan, output=plan.output.with_name("copied"))
    report = convert(other)
    assert report.linked == 0
    assert snapshot(other.output) == linked


def test_the_index_and_the_config_follow(plan):
    convert(plan)
    old, new = (
        json.loads((folder / "transformer" / INDEX).read_text())
        for folder in (plan.base, plan.output)
    )
    assert new["weight_map"] == old["weight_map"]
    tensors = tensors_of(plan.output)
    assert new["metadata"]["total_size"] == sum(tensor.nbytes for tensor in tensors.values())
    config = json.loads((plan.output / "transformer/config.json").read_text())
    assert config == {
        "_class_name": "Flux2Transformer2DModel",
        "in_channels": 48,
        "out_channels": None,
    }


def test_no_host_name_and_no_path_enters_the_folder(plan):
    convert(plan)
    everything = b"".join(snapshot(plan.output).values())
    for secret in (str(plan.base.parent), os.uname().nodename, str(Path.home())):
        assert secret.encode() not in everything


def test_the_same_conversion_gives_the_same_bytes(plan):
    convert(plan)
    again = dataclasses.replace(plan, output=plan.output.with_name("again"))
    convert(again)
    assert snapshot(plan.output) == snapshot(again.output)


def test_a_second_run_says_that_it_is_done(plan):
    first = convert(plan)
    before = snapshot(plan.output)
    second = convert(plan)
    assert second.already_done
    assert not first.already_done
    assert second.maps == first.maps
    assert snapshot(plan.output) == before


def into_blobs(snapshot: Path) -> None:
    """Make of a folder what the hub's cache holds: links to files of other names."""
    blobs = snapshot.parents[1] / "blobs"
    blobs.mkdir()
    for number, path in enumerate(sorted(p for p in snapshot.rglob("*") if p.is_file())):
        path.rename(blobs / f"{number:064x}")
        path.symlink_to(os.path.relpath(blobs / f"{number:064x}", path.parent))


def test_a_base_in_the_hub_cache_is_a_tree_of_symlinks(plan, tmp_path):
    (tmp_path / "models--x--y/snapshots").mkdir(parents=True)
    snapshot = plan.base.rename(tmp_path / "models--x--y/snapshots/0a1b2c")
    into_blobs(snapshot)
    plan = dataclasses.replace(plan, base=snapshot)
    convert(plan)
    assert not any(path.is_symlink() for path in plan.output.rglob("*"))
    assert check_manifest(plan.output) == []


@pytest.mark.parametrize(
    "name",
    [
        "NOTICE",
        "vae/more.txt",
        "vae/diffusion_pytorch_model.safetensors",
        "transformer/diffusion_pytorch_model-00001-of-00003.safetensors",
        "transformer/config.json",
        "model_index.json",
        "README.md",
    ],
)
def test_a_link_that_leads_out_of_the_base_is_refused_by_name(name, plan, tmp_path):
    """What is lifted is published: nobody's key may get into it."""
    path = plan.base / name
    with contextlib.suppress(FileNotFoundError):
        path.rename(tmp_path / "secret")
    (tmp_path / "secret").touch()
    path.symlink_to(tmp_path / "secret")
    with pytest.raises(BadData, match=f"{path}: a link that leads out of {plan.base}, to "):
        convert(plan)
    assert not plan.output.exists()
    path.unlink()
    (tmp_path / "secret").rename(plan.base / "kept.txt")
    path.symlink_to(plan.base / "kept.txt")
    convert(plan)
    assert (plan.output / name).is_file()
    assert not any(path.is_symlink() for path in plan.output.rglob("*"))


def test_a_component_that_is_a_link_out_of_the_base_is_refused(plan, tmp_path):
    (plan.base / "vae").rename(tmp_path / "vae")
    (plan.base / "vae").symlink_to(tmp_path / "vae")
    with pytest.raises(BadData, match=f"{plan.base / 'vae'}: a link that leads out of"):
        convert(plan)


def test_a_pipe_in_a_component_is_refused_by_name(plan):
    os.mkfifo(plan.base / "vae/x")
    with pytest.raises(BadData, match="vae/x: no file, but a folder, a device, a pipe or a broken"):
        convert(plan)


def test_what_does_not_belong_to_the_model_stays_behind_and_is_noted(plan):
    (plan.base / "transformer/diffusion_pytorch_model.fp16.safetensors").write_bytes(b"x")
    (plan.base / "text_encoder/pytorch_model.bin").write_bytes(b"x")
    (plan.base / "flux2.safetensors").write_bytes(b"x")
    notes = " ".join(convert(plan).notes)
    assert "left out (diffusion_pytorch_model.fp16.safetensors)" in notes
    assert "pickles are left out (pytorch_model.bin)" in notes
    names = snapshot(plan.output).keys()
    assert not any("fp16" in name or "bin" in name or name == "flux2.safetensors" for name in names)


def test_without_its_text_encoder_folder_a_base_still_converts(plan):
    for path in (plan.base / "text_encoder").iterdir():
        path.unlink()
    (plan.base / "text_encoder").rmdir()
    assert any("text_encoder: named in model_index.json" in note for note in convert(plan).notes)


# -- a second network, which guidance goes against


@pytest.fixture
def two(tmp_path):
    return fake_plan(tmp_path, second=True)


def test_both_networks_are_lifted_by_one_basis(two):
    report = convert(two)
    A = random_basis(D, d, torch.Generator().manual_seed(0)).float().double()
    for component, seed in (("transformer", 0), (SECOND, 100)):
        old, new = transformer_tensors(seed), tensors_of(two.output, component)
        assert torch.equal(
            new["x_embedder.weight"], (old["x_embedder.weight"].double() @ A.T).float()
        )
        assert torch.equal(new["proj_out.weight"], (A @ old["proj_out.weight"].double()).float())
        block = "transformer_blocks.0.attn.to_q.weight"
        assert torch.equal(new[block], old[block])
        config = json.loads((two.output / component / "config.json").read_text())
        assert config["in_channels"] == 48
    assert report.written == 3
    assert report.notes == []
    assert max(dataclasses.astuple(report.maps)) < 1e-7
    lifted, base = read_lifted(two.output), DiffusersFolder(two.base)
    assert lifted.networks == ("transformer", SECOND)
    assert lifted.fingerprints[f"base_{SECOND}"] == base.fingerprint(SECOND)
    assert convert(two).already_done


def test_another_second_network_makes_another_conversion(two):
    convert(two)
    weights = two.base / SECOND / "diffusion_pytorch_model.safetensors"
    save_tensors(weights, transformer_tensors(101))
    with pytest.raises(CannotWrite, match=rf"another conversion \(base_{SECOND} sha256"):
        convert(two)


def test_both_networks_of_a_killed_run_are_kept(two, monkeypatch):
    def killed(*args):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr("asymlift.stages.convert._verify", killed)
        convert(two)
    report = convert(two)
    assert (report.written, report.resumed) == (3, 3)
    again = dataclasses.replace(two, output=two.output.with_name("again"))
    convert(again)
    assert snapshot(two.output) == snapshot(again.output)


def test_the_space_of_both_networks_is_needed(two, monkeypatch):
    both = space_needed(two, monkeypatch)
    family = FAMILIES["flux2"]  # which knows of no second one: its config is copied
    one = space_needed(dataclasses.replace(two, family=family), monkeypatch)
    config = (two.base / SECOND / "config.json").stat().st_size
    convert(two)
    lifted = two.output / SECOND / "diffusion_pytorch_model.safetensors"
    assert both - one == lifted.stat().st_size - config


@pytest.mark.parametrize("named", [True, False])
def test_a_base_without_its_second_network_still_converts_and_is_told(named, two):
    shutil.rmtree(two.base / SECOND)
    if not named:
        index = json.loads((two.base / "model_index.json").read_text())
        index[SECOND] = [None, None]
        (two.base / "model_index.json").write_text(json.dumps(index))
    (note,) = convert(two).notes
    assert f"there is no {SECOND}/, so guidance will go against the empty prompt" in note
    assert read_lifted(two.output).networks == ("transformer",)


def test_a_second_network_of_another_kind_is_refused(two):
    path = two.base / SECOND / "config.json"
    config = json.loads(path.read_text())
    path.write_text(json.dumps(config | {"in_channels": 2 * d}))
    with pytest.raises(BadData, match=f"transformer and {SECOND} do not read the same latents"):
        convert(two)
    path.write_text(json.dumps(config | {"_class_name": "SD3Transformer2DModel"}))
    with pytest.raises(BadData, match=f"its {SECOND} is a SD3Transformer2DModel, but family flux2"):
        convert(two)
    assert not two.output.exists()


@pytest.mark.parametrize("factor", [1.001, float("nan")])
def test_the_maps_of_the_second_network_are_read_back_too(factor, two, monkeypatch):
    real = self_check.read_tensor

    def faulty(path, name):
        value = real(path, name)
        wrong = value.shape == (D, INNER) and path.parent.name == SECOND
        return value * factor if wrong else value

    monkeypatch.setattr(self_check, "read_tensor", faulty)
    with pytest.raises(BadData, match="the maps that were written are not those of the base"):
        convert(two)
    assert list(two.output.parent.iterdir()) == []


# -- over something that is there


def test_another_conversion_is_replaced_only_on_request(plan, tmp_path):
    convert(fake_plan(tmp_path, seed=1))
    before = snapshot(plan.output)
    with pytest.raises(CannotWrite, match=r"another conversion \(base.*basis.*Use --overwrite"):
        convert(plan)
    assert snapshot(plan.output) == before

    convert(dataclasses.replace(plan, overwrite=True))
    after = snapshot(plan.output)
    assert after != before
    convert(other := dataclasses.replace(plan, output=plan.output.with_name("other")))
    assert after == snapshot(other.output)
    assert sorted(p.name for p in plan.output.parent.iterdir()) == ["lifted", "other"]


def test_a_damaged_target_is_made_again_only_on_request(plan):
    convert(plan)
    good = snapshot(plan.output)
    (plan.output / "transformer/config.json").write_text("{}")
    with pytest.raises(CannotWrite, match=r"damaged \(transformer/config\.json: 2 bytes"):
        convert(plan)
    convert(dataclasses.replace(plan, overwrite=True))
    assert snapshot(plan.output) == good


def test_a_folder_of_the_user_is_never_replaced(plan):
    plan.output.mkdir(parents=True)
    (plan.output / "thesis.tex").write_text("years of work")
    for overwrite in (False, True):
        with pytest.raises(CannotWrite, match="was not made by `asymlift convert`"):
            convert(dataclasses.replace(plan, overwrite=overwrite))
    assert snapshot(plan.output) == {"thesis.tex": b"years of work"}


def test_an_empty_folder_is_filled(plan):
    plan.output.mkdir(parents=True)
    convert(plan)
    assert check_manifest(plan.output) == []


def test_an_unfinished_conversion_of_something_else_is_discarded_loudly(plan):
    new = plan.output.with_name(".lifted.work") / "new"
    new.mkdir(parents=True)
    (new / "stale").touch()
    (new.parent / "identity").write_text("something else")
    report = convert(plan)
    assert any("unfinished conversion of something else" in note for note in report.notes)
    assert "stale" not in snapshot(plan.output)


def test_a_second_convert_at_the_same_time_is_refused(plan):
    lock = plan.output.with_name(".lifted.lock")
    lock.parent.mkdir()
    refused = pytest.raises(CannotWrite, match=f"pid {os.getpid()}")
    with files.exclusive_lock(lock, "lifted"), refused:
        convert(plan)


def test_copies_count_as_space_even_where_links_are_possible(plan, monkeypatch):
    before = space_needed(plan, monkeypatch)
    for name in (
        "README.md",
        "scheduler/scheduler_config.json",
        "text_encoder/model.safetensors",
    ):
        with (plan.base / name).open("ab") as file:
            file.write(b" " * 1000)
    assert space_needed(plan, monkeypatch) == before + 2000  # weights are linked


def test_too_little_space_is_said_before_the_first_byte(plan, monkeypatch):
    monkeypatch.setattr("asymlift.stages.convert.free_bytes", lambda path: 1000)
    with pytest.raises(CannotWrite, match=r"lifted: needs 1\.0 MiB, but only 1000 bytes are free"):
        convert(plan)
    assert not plan.output.exists()


def test_the_copies_of_a_killed_run_are_kept_and_need_no_space(plan, monkeypatch):
    """On another file system, where every file costs space."""

    def no_links(self, target):
        raise OSError(errno.EXDEV, "Invalid cross-device link")

    def killed(*args):
        raise KeyboardInterrupt

    monkeypatch.setattr(Path, "hardlink_to", no_links)
    shard = next((plan.base / "transformer").glob("*-00002-of-*"))  # of no map
    text_encoder = plan.base / "text_encoder/model.safetensors"
    index = plan.base / "model_index.json"
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr("asymlift.stages.convert._verify", killed)
        convert(plan)
    new = plan.output.with_name(".lifted.work") / "new"
    copies = [new / path.relative_to(plan.base) for path in (shard, text_encoder, index)]
    before = [path.stat().st_mtime_ns for path in copies]
    monkeypatch.setattr("asymlift.stages.convert.free_bytes", lambda path: SLACK)

    convert(plan)

    copies = [plan.output / path.relative_to(plan.base) for path in (shard, text_encoder, index)]
    assert [path.stat().st_mtime_ns for path in copies] == before


# -- what does not belong together


def test_a_basis_for_another_model_is_refused_with_both_values(plan):
    other = write_base(plan.base.parent / "other", seed=5)
    theirs, ours = (DiffusersFolder(base).fingerprint("vae") for base in (other, plan.base))
    write_basis(plan.basis, other)
    with pytest.raises(BadData, match=rf"another VAE\s.*{theirs}.*\s.*\s.*{ours}"):
        convert(plan)
    write_basis(plan.basis, plan.base, family="sd3")
    with pytest.raises(BadData, match=r"fitted for family sd3, but .* is flux2"):
        convert(plan)
    A = random_basis(D, 4, torch.Generator()).float().contiguous()
    write_basis(plan.basis, plan.base, A=A)
    with pytest.raises(BadData, match=r"has rank 4, but a latent token of .* has 8 numbers"):
        convert(plan)
    A = random_basis(192, 8, torch.Generator()).float().contiguous()
    write_basis(plan.basis, plan.base, A=A, patch=8)
    with pytest.raises(BadData, match="for patches of 8 pixels; 4 is asked for"):
        convert(plan)
    write_basis(plan.basis, plan.base, order="p q c")
    with pytest.raises(BadData, match="in order 'p q c'"):
        convert(plan)
    assert not plan.output.exists()


def test_a_published_basis_needs_its_colour_from_the_recipe(plan):
    A = random_basis(D, d, torch.Generator()).float().contiguous()
    save_tensors(plan.basis, {"proj_mat_p4": A, "scale_p4": torch.tensor(0.5)})
    with pytest.raises(BadData, match="does not say in which colour space"):
        convert(plan)
    color = ColorCode("oklab", (0.56, 0.0, 0.01), 0.16)
    report = convert(dataclasses.replace(plan, color=color))
    assert any("does not say the model family" in note for note in report.notes)


def test_basis_and_recipe_cannot_disagree_about_colour(plan):
    rgb = ColorCode("rgb", (0.5, 0.5, 0.5), 0.5)
    with pytest.raises(BadData, match=r"was fitted in ColorCode\(space='oklab'.*recipe says"):
        convert(dataclasses.replace(plan, color=rgb))


def test_a_component_that_leads_out_of_the_base_is_refused_and_not_copied(plan):
    index = json.loads((plan.base / "model_index.json").read_text())
    index["../escaped"] = ["transformers", "CLIPTextModel"]
    (plan.base / "model_index.json").write_text(json.dumps(index))
    secret = plan.base.parent / "escaped"
    secret.mkdir()
    (secret / "config.json").write_text("{}")
    with pytest.raises(BadData, match=r"'\.\./escaped', which is no plain folder name"):
        convert(plan)
    assert list(plan.output.parent.iterdir()) == []


def test_the_family_must_be_that_of_the_checkpoint(plan):
    with pytest.raises(BadData, match="is a Flux2Transformer2DModel, but family sd3"):
        convert(dataclasses.replace(plan, family=FAMILIES["sd3"]))


def test_a_lifted_model_is_no_base(plan):
    convert(plan)
    again = dataclasses.replace(plan, base=plan.output, output=plan.output.with_name("twice"))
    with pytest.raises(BadData, match="is lifted already"):
        convert(again)


def test_pickled_parts_are_refused_and_left_unread(plan):
    weights = plan.base / "text_encoder/model.safetensors"
    weights.rename(weights.with_name("pytorch_model.bin"))
    with pytest.raises(BadData, match=r"pytorch_model\.bin: a pickle"):
        convert(plan)


def test_a_base_whose_map_is_nan_leaves_no_output(tmp_path):
    plan = fake_plan(tmp_path, shards=1)
    tensors = transformer_tensors(0)
    tensors["proj_out.weight"][3, 5] = float("nan")
    save_tensors(plan.base / "transformer/diffusion_pytorch_model.safetensors", tensors)
    with pytest.raises(BadData, match=r"proj_out\.weight holds NaN"):
        convert(plan)
    assert not plan.output.exists()


def test_maps_that_read_back_wrong_leave_no_output(plan, monkeypatch):
    """As a faulty disk would: the values that come back are not those that were written."""
    real = self_check.read_tensor

    def faulty(path, name):
        value = real(path, name)
        return value * 1.001 if value.shape == (D, INNER) else value

    monkeypatch.setattr(self_check, "read_tensor", faulty)
    with pytest.raises(BadData, match=r"relative error 1\.0e-03, allowed is 2e-06"):
        convert(plan)
    assert list(plan.output.parent.iterdir()) == []


# -- the whole model, with the real classes


@pytest.fixture(scope="module")
def real_base(tmp_path_factory):
    """A tiny pipeline of the real classes, text encoders included."""
    folder = tmp_path_factory.mktemp("pipelines")
    return functools.cache(lambda name: tiny.write_pipeline(folder / name, name))


@pytest.mark.parametrize("name", FAMILIES)
def test_pixels_follow_latents_through_the_real_classes(name, real_base, tmp_path):
    """Euler in pixels is Euler in latents seen through A, with the folder's own text encoders."""
    base = real_base(name)
    plan = real_plan(tmp_path, name, base)
    report = convert(plan)
    assert report.coupling.error <= COUPLING_TOLERANCE / 10
    assert report.coupling.psnr > 100
    facts = json.loads((plan.output / "transformer/asymlift.json").read_text())
    assert facts["verification"]["coupling"] == dataclasses.asdict(report.coupling)


def real_plan(folder, name, base, **changes):
    geometry = tiny.tiny_geometry(name)
    A = tiny.random_basis(geometry).float().contiguous()
    vae = DiffusersFolder(base).fingerprint("vae")
    basis = write_basis(
        folder / "basis.safetensors",
        base,
        A=A,
        patch=geometry.pixel_patch,
        family=name,
        vae_fingerprint=vae,
    )
    plan = fake_plan(folder / "unused", verify="full", family=FAMILIES[name])
    return dataclasses.replace(plan, base=base, basis=basis, output=folder / "lifted", **changes)


def test_a_family_that_describes_another_model_is_found_out_and_leaves_nothing(real_base, tmp_path):
    """Each map is right in itself, but the family is wrong about how its numbers are ordered."""
    plan = real_plan(tmp_path, "flux2", real_base("flux2"))
    wrong = dataclasses.replace(plan.family, order_out="p q c")
    with pytest.raises(BadData, match="does not follow sampling in latents"):
        convert(dataclasses.replace(plan, family=wrong))
    assert not plan.output.exists()
    assert not plan.output.with_name(".lifted.work").exists()


@torch.no_grad()
def test_the_stock_pipeline_runs_the_lifted_folder_with_guidance(real_base, tmp_path):
    plan = real_plan(tmp_path, "ideogram4", real_base("ideogram4"), verify="maps")
    convert(plan)
    pipeline = third_party.library("diffusers").Ideogram4Pipeline.from_pretrained(plan.output)
    pipeline.set_progress_bar_config(disable=True)
    geometry, call = tiny.tiny_geometry("ideogram4"), case_of("ideogram4").call

    def drawn(guidance):
        options = call | {"guidance_scale": guidance, "generator": torch.Generator().manual_seed(0)}
        return pipeline(**options, num_inference_steps=2, output_type="latent").images

    one, other = drawn(1.0), drawn(4.0)
    assert one.shape == (1, 24, geometry.D)
    assert (one - other).norm() > 0.01 * one.norm()


def test_the_second_network_is_sampled_in_the_full_check(real_base, tmp_path, monkeypatch):
    real = loading.load_transformer

    def spoiled(folder, family, *, dtype, component):
        net = real(folder, family, dtype=dtype, component=component)
        if component == "unconditional_transformer" and folder != plan.base:
            net.final_layer.linear.weight.data.mul_(1.1)
        return net

    plan = real_plan(tmp_path, "ideogram4", real_base("ideogram4"))
    monkeypatch.setattr(loading, "load_transformer", spoiled)
    with pytest.raises(
        BadData, match="unconditional_transformer: sampling in pixels does not follow"
    ):
        convert(plan)
    assert not plan.output.exists()


def test_the_whole_model_is_checked_in_full_float32(real_base, tmp_path, monkeypatch):
    """cuDNN stays on, TensorFloat32 goes off, and afterwards all is as the caller had it."""

    def settings():
        cudnn = torch.backends.cudnn
        return cudnn.enabled, cudnn.allow_tf32, torch.get_float32_matmul_precision()

    def euler(*args):
        seen.append(settings())
        return real(*args)

    seen, real, before = [], self_check.euler, torch.get_float32_matmul_precision()
    monkeypatch.setattr(self_check, "euler", euler)
    torch.set_float32_matmul_precision("high")
    try:
        convert(real_plan(tmp_path, "flux2", real_base("flux2")))
        assert settings() == (True, True, "high")
    finally:
        torch.set_float32_matmul_precision(before)
    assert seen == [(True, False, "highest")] * 2


def test_a_container_too_small_for_the_full_check_gets_that_of_the_maps(
    real_base, tmp_path, monkeypatch
):
    plan = real_plan(tmp_path, "flux2", real_base("flux2"))
    (tmp_path / "memory.max").write_text(f"{2**29}\n")
    monkeypatch.setattr("asymlift.runtime.memory.GROUPS", tmp_path)
    monkeypatch.setattr("asymlift.runtime.memory.OWN_GROUPS", tmp_path / "none")
    report = convert(dataclasses.replace(plan, verify="auto"))
    assert report.coupling is None
    assert any("memory, 512.0 MiB are available" in note for note in report.notes)


def test_the_full_check_needs_encoders_or_conditioning(real_base, tmp_path):
    base = tmp_path / "base"
    shutil.copytree(real_base("flux2"), base, ignore=shutil.ignore_patterns("text_encoder"))
    plan = real_plan(tmp_path, "flux2", base)
    with pytest.raises(Unavailable, match=r"text_encoder/ is not in the base.*Use --verify maps"):
        convert(plan)
    auto = convert(dataclasses.replace(plan, verify="auto"))
    assert auto.coupling is None
    assert any("verified only the two maps: text_encoder/" in note for note in auto.notes)
    given = dataclasses.replace(plan, conditioning=lambda: tiny.tiny_text("flux2", 2))
    late = convert(given)  # already there: checked now, not converted again
    assert late.already_done
    assert late.coupling.error <= COUPLING_TOLERANCE


def test_a_package_that_prompts_need_costs_the_full_check_alone(real_base, tmp_path, monkeypatch):
    """And not the whole conversion, when everything has been written."""
    plan = real_plan(tmp_path, "prx", real_base("prx"))
    monkeypatch.setitem(sys.modules, "ftfy", None)
    with pytest.raises(Unavailable, match="prx: no prompt can be embedded without ftfy"):
        convert(plan)
    auto = convert(dataclasses.replace(plan, verify="auto"))
    assert auto.coupling is None
    assert any("verified only the two maps: prx: no prompt can be" in note for note in auto.notes)
