"""Tensors come back from a shard as exactly as their dtype allows, and never as nonsense."""

import pytest
import safetensors.torch
import torch
from safetensors import SafetensorError
from torch.testing import assert_close

from asymlift.data.packing import DTYPES, MOST_HEADER, pack, packed_size, unpack
from asymlift.errors import BadData

DRAW = torch.Generator().manual_seed(0)
LATENT = torch.randn(16, 24, 32, generator=DRAW)
TEXT = torch.randn(77, 64, generator=DRAW) * torch.logspace(-6, 6, 77)[:, None]

dtypes = pytest.mark.parametrize("dtype", DTYPES)


@dtypes
def test_what_is_stored_differs_by_at_most_a_rounding(dtype):
    bound = {"float32": 0, "float16": 2**-11, "bfloat16": 2**-8, "float8": 2**-4}[dtype]
    back = unpack(pack({"latent": LATENT}, dtype))["latent"]
    large = LATENT.abs() > 2e-4 * LATENT.abs().amax(-1, keepdim=True)  # smaller: next test
    error = (back.float() - LATENT).abs() / LATENT.abs()
    assert error[large].max() <= bound * (1 + 1e-5)
    assert back.dtype == (torch.float32 if dtype == "float8" else DTYPES[dtype])


def test_float8_has_a_scale_for_every_row():
    """Rows from 1e-6 to 1e6: each is as exact as if it were alone, the largest value nearly."""
    back = unpack(pack({"text": TEXT}, "float8"))["text"]
    top, at = TEXT.abs().max(-1, keepdim=True)
    assert_close(back.gather(-1, at).abs(), top, rtol=1e-6, atol=0)
    normal = TEXT.abs() >= top * 2**-6 / 448
    assert ((back - TEXT).abs() <= TEXT.abs() * 2**-4 * (1 + 1e-5))[normal].all()
    assert ((back - TEXT).abs() <= top * 2**-10 / 448 * (1 + 1e-5))[~normal].all()


def test_float8_stores_the_largest_as_448_and_its_scale_by_name():
    stored = safetensors.torch.load(pack({"text": TEXT}, "float8"))
    assert sorted(stored) == ["text", "text.scale"]
    assert stored["text"].dtype == torch.float8_e4m3fn
    assert stored["text.scale"].dtype == torch.float32
    assert stored["text.scale"].shape == (77, 1)
    assert (stored["text"].float().abs().amax(-1) == 448).all()


@dtypes
@pytest.mark.parametrize("shape", [(), (1,), (3, 4), (0, 4)])
def test_zeros_of_any_shape_stay_zeros(dtype, shape):
    back = unpack(pack({"x": torch.zeros(shape)}, dtype))["x"]
    assert_close(back.float(), torch.zeros(shape))


def test_float8_survives_the_smallest_and_the_largest_numbers():
    rows = torch.tensor([[1e-44, 0], [-1e-38, 1e-39], [3e38, -3e38]])
    back = unpack(pack({"x": rows}, "float8"))["x"]
    assert_close(back, rows, rtol=2**-4, atol=1e-39)


@dtypes
def test_numbers_that_are_not_floating_are_left_alone(dtype):
    tensors = {
        "mask": torch.tensor([True, False]),
        "ids": torch.tensor([[2**40, -1]]),
        "image": torch.arange(6, dtype=torch.uint8).view(2, 3),
    }
    back = unpack(pack(tensors, dtype))
    for name, tensor in tensors.items():
        assert torch.equal(back[name], tensor) and back[name].dtype == tensor.dtype


@dtypes
def test_the_same_tensors_give_the_same_bytes_in_any_order_layout_and_memory(dtype):
    one = {"b": LATENT, "a": LATENT[0], "ids": torch.arange(3)}
    other = {"ids": torch.arange(3), "a": LATENT[0].mT.contiguous().mT, "b": LATENT.clone()}
    assert pack(one, dtype) == pack(other, dtype)


@dtypes
@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_a_tensor_that_is_not_finite_is_named(dtype, value):
    with pytest.raises(BadData, match="latent holds values that are not finite"):
        pack({"good": LATENT, "latent": torch.tensor([[1, value, 2]])}, dtype)


def test_a_number_beyond_float16_is_named_and_fits_elsewhere():
    large = {"text": torch.tensor([1.0, -70000.0])}
    with pytest.raises(BadData, match=r"text reaches 7e\+04, more than float16 can hold"):
        pack(large, "float16")
    for dtype in ("float32", "bfloat16", "float8"):
        assert unpack(pack(large, dtype))["text"][1].item() == pytest.approx(-70000, rel=2**-8)


@pytest.mark.parametrize("cut", [0, 4, 100])
def test_broken_bytes_raise_what_safetensors_raises(cut):
    with pytest.raises((SafetensorError, ValueError)):
        unpack(pack({"x": LATENT}, "float8")[:cut])


@dtypes
@pytest.mark.parametrize(
    "shapes",
    [
        {"latent": (16, 64, 64)},
        {"prompt_embeds": (512, 4096), "pooled": (768,), "mask": (512,)},
        {f"layer{number}": (3,) for number in range(20)},
        {"scalar": ()},
    ],
)
def test_the_size_is_known_in_advance(dtype, shapes):
    size = len(pack({name: torch.ones(shape) for name, shape in shapes.items()}, dtype))
    assert packed_size(shapes, dtype) == pytest.approx(size, rel=0.03)


def test_scales_that_would_make_a_tensor_grow_are_refused():
    tall = {"a": torch.zeros(8, 1).to(torch.float8_e4m3fn), "a.scale": torch.ones(1, 8)}
    with pytest.raises(ValueError, match=r"a is \(8, 1\), its scales \(1, 8\)"):
        unpack(safetensors.torch.save(tall))


def test_a_header_that_no_sample_needs_is_refused_unread():
    data = (MOST_HEADER + 1).to_bytes(8, "little") + b"{" + b" " * MOST_HEADER
    with pytest.raises(ValueError, match="its header is longer than 1048576 bytes"):
        unpack(data)
