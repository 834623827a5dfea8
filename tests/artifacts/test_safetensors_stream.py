"""Our safetensors files are those of the safetensors package, and damage is found."""

import errno
import json
import os
import random

import pytest
import safetensors.torch
import torch

from asymlift.artifacts import safetensors_stream
from asymlift.artifacts.files import sha256_file
from asymlift.artifacts.parsing import MOST_JSON
from asymlift.artifacts.safetensors_stream import (
    DTYPES,
    SafetensorsWriter,
    TensorInfo,
    load_tensors,
    read_header,
    read_tensor,
    save_tensors,
    stretch_reader,
    tensor_bytes,
)
from asymlift.errors import BadData, CannotWrite


def random_tensors(seed):
    """Up to twelve tensors of any type and shape, empty and scalar ones included."""
    dice = random.Random(seed)
    tensors = {}
    for number in range(dice.randint(1, 12)):
        dtype = dice.choice([dtype for _, dtype in DTYPES.values()])
        shape = [dice.randint(0, 5) for _ in range(dice.randint(0, 3))]
        size = torch.empty(shape, dtype=dtype).nbytes
        raw = torch.tensor(list(dice.randbytes(size)), dtype=torch.uint8)
        if dtype == torch.bool:
            raw %= 2
        name = dice.choice(["block.", "x", "\u00e9"]) + f'"{number}.weight'
        tensors[name] = raw.view(dtype).reshape(shape) if size else torch.empty(shape, dtype=dtype)
    return tensors


@pytest.mark.parametrize("seed", range(40))
def test_the_bytes_are_those_of_the_safetensors_package(seed, tmp_path):
    tensors = random_tensors(seed)
    metadata = {"format": "pt"} if seed % 2 else None
    safetensors.torch.save_file(tensors, tmp_path / "theirs", metadata)

    save_tensors(tmp_path / "ours", tensors, metadata)

    assert (tmp_path / "ours").read_bytes() == (tmp_path / "theirs").read_bytes()


@pytest.mark.parametrize("seed", range(20))
def test_what_the_package_wrote_is_read_back_bit_for_bit(seed, tmp_path):
    tensors = random_tensors(seed)
    safetensors.torch.save_file(tensors, tmp_path / "file")

    read = load_tensors(tmp_path / "file")

    assert read.keys() == tensors.keys()
    for name, tensor in tensors.items():
        assert TensorInfo.of(read[name]) == TensorInfo.of(tensor)
        assert bytes(tensor_bytes(read[name])) == bytes(tensor_bytes(tensor))


def test_a_tensor_is_read_whole_however_small_the_pieces(tmp_path, monkeypatch):
    monkeypatch.setattr(safetensors_stream, "CHUNK", 7)
    tensors = {"a": torch.randn(5, 9), "b": torch.arange(100)}
    safetensors.torch.save_file(tensors, tmp_path / "file")
    read = load_tensors(tmp_path / "file")
    assert all(torch.equal(read[name], tensors[name]) for name in tensors)


def test_the_order_of_writing_and_of_metadata_changes_nothing(tmp_path):
    tensors = random_tensors(5)
    infos = {name: TensorInfo.of(tensor) for name, tensor in tensors.items()}
    once = save_tensors(tmp_path / "once", tensors, {"a": "1", "b": "2"})

    with SafetensorsWriter(tmp_path / "twice", infos, {"b": "2", "a": "1"}) as writer:
        for name in reversed(list(tensors)):
            writer.write(name, (tensor_bytes(tensors[name])[i : i + 1] for i in range(10**4)))

    assert writer.sha256 == once
    assert (tmp_path / "once").read_bytes() == (tmp_path / "twice").read_bytes()


@pytest.mark.parametrize("refusal", [None, errno.EXDEV, AttributeError])
def test_tensors_are_copied_from_file_to_file(refusal, tmp_path, monkeypatch):
    tensors = random_tensors(5)
    save_tensors(tmp_path / "source", tensors)
    header = read_header(tmp_path / "source")

    def refused(*arguments):
        raise OSError(refusal, "refused") if isinstance(refusal, int) else AttributeError

    if refusal:
        monkeypatch.setattr(safetensors_stream.os, "copy_file_range", refused)
    monkeypatch.setattr(safetensors_stream, "CHUNK", 7)
    with SafetensorsWriter(tmp_path / "copy", header.tensors, {"format": "pt"}) as writer:
        for name, info in header.tensors.items():
            writer.copy(name, tmp_path / "source", info)

    safetensors.torch.save_file(tensors, tmp_path / "theirs", {"format": "pt"})
    assert (tmp_path / "copy").read_bytes() == (tmp_path / "theirs").read_bytes()
    assert writer.sha256 == sha256_file(tmp_path / "copy")


def test_a_file_that_shrinks_while_it_is_copied_leaves_no_copy(tmp_path):
    save_tensors(tmp_path / "source", {"a": torch.zeros(100)})
    info = read_header(tmp_path / "source").tensors["a"]
    os.truncate(tmp_path / "source", info.start + 8)
    ended = pytest.raises(BadData, match="source: ended while it was being read")
    with ended, SafetensorsWriter(tmp_path / "copy", {"a": info}) as writer:
        writer.copy("a", tmp_path / "source", info)
    assert [path.name for path in tmp_path.iterdir()] == ["source"]


def test_after_an_exception_no_file_is_left(tmp_path):
    infos = {"a": TensorInfo("F32", (2,)), "b": TensorInfo("F32", (2,))}
    with (
        pytest.raises(RuntimeError),
        SafetensorsWriter(tmp_path / "file", infos) as writer,
    ):
        writer.write("a", torch.zeros(2))
        raise RuntimeError
    assert list(tmp_path.iterdir()) == []


def test_a_file_with_a_tensor_missing_is_never_finished(tmp_path):
    with (
        pytest.raises(AssertionError, match="never written"),
        SafetensorsWriter(tmp_path / "file", {"a": TensorInfo("F32", (2,))}),
    ):
        pass
    assert list(tmp_path.iterdir()) == []


def test_a_folder_that_is_not_there_cannot_be_written(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(CannotWrite, match="cannot write here"):
        save_tensors(tmp_path / "file" / "x.safetensors", {"a": torch.zeros(2)})


def file_with(header, data=b""):
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return len(text).to_bytes(8, "little") + text + data


def tensor(start, stop, shape=(2,), dtype="F32"):
    return {"dtype": dtype, "shape": list(shape), "data_offsets": [start, stop]}


DAMAGED = {
    "empty": b"",
    "text": b"<!DOCTYPE html><html>Not found</html>" * 4,
    "huge header": (2**62).to_bytes(8, "little") + b"{}",
    "no JSON": file_with(b"{]"),
    "a list": file_with([1]),
    "cut short": file_with({"a": tensor(0, 8)}, b"1234"),
    "trailing bytes": file_with({"a": tensor(0, 8)}, b"12345678X"),
    "a hole": file_with({"a": tensor(0, 8), "b": tensor(12, 20)}, bytes(20)),
    "an overlap": file_with({"a": tensor(0, 8), "b": tensor(4, 12)}, bytes(12)),
    "wrong size": file_with({"a": tensor(0, 8, shape=(3,))}, bytes(8)),
    "negative shape": file_with({"a": tensor(0, 8, shape=(-1, -2))}, bytes(8)),
    "unknown type": file_with({"a": tensor(0, 8, dtype="F33")}, bytes(8)),
    "a name twice": file_with(b'{"a":%s,"a":%s}' % ((json.dumps(tensor(0, 8)).encode(),) * 2)),
    "numbers as metadata": file_with({"__metadata__": {"a": 1}}),
    "an entry without fields": file_with({"a": {}}),
}


@pytest.mark.parametrize("damage", DAMAGED)
def test_a_damaged_file_is_bad_data_that_names_it(damage, tmp_path):
    path = tmp_path / "model.safetensors"
    path.write_bytes(DAMAGED[damage])
    with pytest.raises(BadData, match=r"model\.safetensors: .*"):
        read_header(path)


def test_a_header_that_no_model_needs_is_refused_unread(tmp_path):
    """Lists of nothing, within what the format allows, would take gibibytes."""
    path = tmp_path / "model.safetensors"
    path.write_bytes((MOST_JSON + 1).to_bytes(8, "little"))
    os.truncate(path, 8 + MOST_JSON + 1)
    with pytest.raises(BadData, match=r"model\.safetensors: its header is longer than 16777216 b"):
        read_header(path)


def test_a_header_of_a_hundred_thousand_tensors_is_read(tmp_path):
    """With names as long as those of mixtures of experts."""
    names = [
        f"model.layers.{n // 999}.mlp.experts.{n % 999}.down_proj.weight" for n in range(10**5)
    ]
    header = {
        name: tensor(4096 * n, 4096 * (n + 1), shape=(32, 32)) for n, name in enumerate(names)
    }
    path = tmp_path / "model.safetensors"
    path.write_bytes(file_with(json.dumps(header, separators=(",", ":")).encode()))
    os.truncate(path, path.stat().st_size + 4096 * len(names))
    assert list(read_header(path).tensors) == names


def test_a_tensor_that_is_not_there_is_named(tmp_path):
    save_tensors(tmp_path / "file", {"a": torch.zeros(2)})
    with pytest.raises(BadData, match="no tensor called b"):
        read_tensor(tmp_path / "file", "b")


@pytest.mark.parametrize("stretch", [slice(0, 12), slice(5, 9), slice(3, 3), slice(12, 12)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_stretch_is_that_of_the_flattened_tensor_and_costs_its_own_bytes(
    tmp_path, monkeypatch, dtype, stretch
):
    tensors = {"a": torch.arange(3.0), "b": torch.arange(12.0).view(3, 4).to(dtype)}
    save_tensors(tmp_path / "file", tensors)
    read, sizes = safetensors_stream.read_bytes, []

    def counted(path, info):
        for piece in read(path, info):
            sizes.append(len(piece))
            yield piece

    monkeypatch.setattr(safetensors_stream, "read_bytes", counted)
    found = stretch_reader(tmp_path / "file")("b", stretch)
    assert found.dtype == dtype and torch.equal(found, tensors["b"].flatten()[stretch])
    assert sum(sizes) == found.nbytes


def test_a_stretch_beyond_a_tensor_is_bad_data(tmp_path):
    """Of another tensor of the file nothing is ever taken."""
    save_tensors(tmp_path / "file", {"a": torch.zeros(3, 2), "b": torch.zeros(9)})
    with pytest.raises(BadData, match=r"a has the shape \[3, 2\], and numbers 4 to 7 of it are"):
        stretch_reader(tmp_path / "file")("a", slice(4, 7))


def test_one_tensor_of_a_big_file_costs_its_own_memory(tmp_path):
    """A sparse file of 8 GiB: reading all of it would be killed, reading one tensor is not."""
    path = tmp_path / "big"
    header = {"big": tensor(0, 2**33, shape=(2**31,)), "small": tensor(2**33, 2**33 + 8)}
    path.write_bytes(file_with(header))
    os.truncate(path, path.stat().st_size + 2**33 + 8)
    assert read_tensor(path, "small").tolist() == [0, 0]
