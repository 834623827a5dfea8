"""A basis file keeps what it was given, finds every changed byte, and reads published files."""

import dataclasses

import pytest
import safetensors.torch
import torch

from asymlift.artifacts.basis_file import Basis, has_checksum, load_basis, save_basis
from asymlift.errors import BadData
from asymlift.maths.basis import random_basis
from asymlift.maths.color import ColorCode

PATCH, D, d = 4, 48, 3


@pytest.fixture
def basis():
    generator = torch.Generator().manual_seed(0)
    return Basis(
        A=random_basis(D, d, generator).float().contiguous(),
        s=0.7,
        patch=PATCH,
        method="procrustes",
        family="flux2",
        color=ColorCode("oklab", (0.56, 0.0, 0.01), 0.16),
        num_images=1000,
        alignment={"r2": 0.8, "captured": 0.9},
        spectrum=[3.0, 2.0, 1.0],
        vae_fingerprint="sha256:" + "ab" * 32,
        facts={"seed": 0, "shards": ["train-000000.tar"]},
    )


def test_a_basis_comes_back_as_it_was(basis, tmp_path):
    save_basis(tmp_path / "basis.safetensors", basis)
    read = load_basis(tmp_path / "basis.safetensors")
    assert torch.equal(read.A, basis.A)
    assert read.s == pytest.approx(0.7, rel=1e-7)
    assert dataclasses.replace(read, A=basis.A, s=basis.s) == basis
    assert read.unknown == []


def test_the_same_basis_gives_the_same_bytes(basis, tmp_path):
    save_basis(tmp_path / "one", basis)
    save_basis(tmp_path / "two", load_basis(tmp_path / "one"))
    assert (tmp_path / "one").read_bytes() == (tmp_path / "two").read_bytes()


def test_the_published_code_finds_its_tensors(basis, tmp_path):
    save_basis(tmp_path / "basis.safetensors", basis)
    tensors = safetensors.torch.load_file(tmp_path / "basis.safetensors")
    assert torch.equal(tensors["proj_mat_p4"], basis.A)
    assert tensors["scale_p4"].shape == ()


def test_a_published_file_loads_and_says_what_is_unknown(basis, tmp_path):
    path = tmp_path / "basis.safetensors"
    tensors = {"proj_mat_p4": basis.A, "scale_p4": torch.tensor([0.7])}
    safetensors.torch.save_file(tensors, path, {"format": "pt"})
    read = load_basis(path)
    assert torch.equal(read.A, basis.A)
    assert (read.patch, read.order, read.family, read.color) == (4, "c p q", None, None)
    assert read.unknown == [
        "the model family",
        "the colour space",
        "the VAE that it was fitted for",
    ]
    assert not has_checksum(path)


def test_every_single_byte_change_is_found(basis, tmp_path):
    """Header length, header, padding, metadata, checksum and numbers: one change per byte."""
    path = tmp_path / "basis.safetensors"
    save_basis(path, basis)
    good = path.read_bytes()
    for position in range(len(good)):
        changed = bytes([good[position] ^ 1 << position % 8])
        path.write_bytes(good[:position] + changed + good[position + 1 :])
        with pytest.raises(BadData):
            load_basis(path)


def test_of_several_patches_one_is_chosen(basis, tmp_path):
    path = tmp_path / "basis.safetensors"
    wide = random_basis(192, 8, torch.Generator().manual_seed(1)).float().contiguous()
    one, other = torch.tensor(1.0), torch.tensor(2.0)
    tensors = {"proj_mat_p4": basis.A, "scale_p4": one, "proj_mat_p8": wide, "scale_p8": other}
    safetensors.torch.save_file(tensors, path)
    assert load_basis(path, patch=8).A.shape == (192, 8)
    with pytest.raises(BadData, match="patches of 4, 8 pixels; choose one"):
        load_basis(path)
    with pytest.raises(BadData, match="patches of 4, 8 pixels; 16 is asked for"):
        load_basis(path, patch=16)


def test_what_is_no_basis_is_refused_by_name(basis, tmp_path):
    path = tmp_path / "basis.safetensors"
    good = {"proj_mat_p4": basis.A, "scale_p4": torch.tensor(0.7)}
    for change, message in (
        ({"proj_mat_p4": basis.A * 1.001}, r"proj_mat_p4 are not orthonormal.*reaches 2\.0e-03"),
        ({"proj_mat_p4": basis.A.bfloat16()}, "proj_mat_p4 are not orthonormal"),
        ({"proj_mat_p4": basis.A * float("nan")}, "proj_mat_p4 holds NaN"),
        ({"proj_mat_p4": basis.A.T.contiguous()}, r"proj_mat_p4 has shape \(3, 48\)"),
        ({"proj_mat_p4": basis.A[:27].clone()}, r"for patches of 4 pixels is \(48, d\)"),
        ({"proj_mat_p4": basis.A.int()}, "floating point"),
        ({"scale_p4": torch.tensor(-0.7)}, "scale_p4 is -0.7"),
        ({"scale_p4": torch.tensor(float("nan"))}, "scale_p4 is nan"),
        ({"scale_p4": torch.tensor([1.0, 2.0])}, "its scale one number"),
    ):
        safetensors.torch.save_file(good | change, path)
        with pytest.raises(BadData, match=message):
            load_basis(path)
    safetensors.torch.save_file({"weight": torch.zeros(2)}, path)
    with pytest.raises(BadData, match=r"not a basis.*It holds: weight"):
        load_basis(path)
    safetensors.torch.save_file({"proj_mat_p4": basis.A}, path)
    with pytest.raises(BadData, match="no tensor called scale_p4"):
        load_basis(path)


def test_a_broken_basis_is_not_even_written(basis, tmp_path):
    with pytest.raises(BadData, match="not orthonormal"):
        save_basis(tmp_path / "basis.safetensors", dataclasses.replace(basis, A=basis.A * 2))
    assert list(tmp_path.iterdir()) == []
