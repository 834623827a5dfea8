"""Parts are read by position, checked, and brought to the size that the model sees."""

import io
import json
import os
import random
import threading
from collections.abc import Iterable
from pathlib import Path

import pytest
import torch
from safetensors.torch import save

from asymlift.data import reader as module
from asymlift.data.buckets import fit_image
from asymlift.data.pictures import decode_image, encode_png
from asymlift.data.reader import Reader, is_finite
from asymlift.data.records import BadSample, Part, Record, inline
from asymlift.data.table import index_shard
from asymlift.data.writer import Packed, packed_sample, write_shard
from tests.data.small_shards import PNG, make_sample

LATENT, NAN = torch.zeros(4, 2, 2), torch.full((4, 2, 2), float("nan"))


def record_of(parts: dict[str, bytes], size: tuple[int, int] = (8, 8), **more: object) -> Record:
    held = {suffix: inline(data) for suffix, data in parts.items()}
    return Record("bad", "a.tar!bad", held, *size, **more)


BROKEN = {
    "no image": {".txt": b"x"},
    "not a JPEG, PNG or WebP image": {".png": b"<html>"},
    "image cannot be decoded": {".png": packed_sample(make_sample(0)).members[".png"][:300]},
    "caption is not UTF-8": {".png": PNG, ".txt": b"\xff\xfe"},
    "facts are not a JSON object": {".png": PNG, ".json": b"[]"},
    "captions are not a list of strings": {".png": PNG, ".json": b'{"captions": [1]}'},
    "latent is not a safetensors file": {".png": PNG, ".latent.safetensors": b"garbage!"},
    "latent has the wrong shape": {".png": PNG, ".latent.safetensors": save({"z": LATENT})},
    "latent has the wrong dtype": {
        ".png": PNG,
        ".latent.safetensors": save({"latent": LATENT.int()}),
    },
    "latent holds NaN or infinity": {".png": PNG, ".latent.safetensors": save({"latent": NAN})},
    "text is not a safetensors file": {".png": PNG, ".text.safetensors": b""},
    "text holds NaN or infinity": {".png": PNG, ".text.safetensors": save({"hidden": NAN})},
}


@pytest.mark.parametrize("reason", BROKEN)
def test_a_broken_part_is_named(reason):
    with pytest.raises(BadSample) as caught:
        Reader().read(record_of(BROKEN[reason], (0, 0)))
    assert (caught.value.reason, caught.value.where) == (reason, "a.tar!bad")


@pytest.mark.parametrize("facts", [b"{", b"\xff", b"[" * 100_000, b"1", b"null"])
def test_facts_that_are_no_object(facts):
    with pytest.raises(BadSample, match="facts are not a JSON object"):
        Reader().read(record_of({".png": PNG, ".json": facts}))


def test_a_picture_of_another_size_than_was_said():
    with pytest.raises(BadSample, match=r"wrong size in the facts \(9 x 8, not 8 x 8\)"):
        Reader().read(record_of({".png": PNG}, (9, 8)))


def test_a_latent_of_the_wrong_shape_says_what_it_is():
    part = save({"latent": LATENT[None]})
    with pytest.raises(BadSample, match=r"need \(C, h, w\), has latent \(1, 4, 2, 2\)"):
        Reader().latent(record_of({".latent.safetensors": part}))


@pytest.mark.parametrize(
    "tensors",
    [
        {"hidden": torch.zeros(3, 4, dtype=torch.float8_e4m3fn)},  # without its scale
        {"hidden": torch.zeros(3, 4).to(torch.float8_e4m3fn), "hidden.scale": torch.ones(7, 1)},
    ],
)
def test_a_float8_tensor_that_cannot_be_scaled_is_a_bad_sample(tensors):
    with pytest.raises(BadSample, match="text is not a safetensors file"):
        Reader().text(record_of({".text.safetensors": save(tensors)}))


def test_a_huge_shape_in_a_latent_costs_no_memory():
    claim = {"latent": {"dtype": "F32", "shape": [2**31, 2**31, 1], "data_offsets": [0, 4]}}
    header = json.dumps(claim).encode()
    data = len(header).to_bytes(8, "little") + header + bytes(4)
    with pytest.raises(BadSample, match="latent is not a safetensors file"):
        Reader().read(record_of({".png": PNG, ".latent.safetensors": data}))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_numbers_are_finite_or_not_wherever_they_stand(dtype):
    for place in (0, 5, 11):
        for value in (float("nan"), float("inf"), float("-inf")):
            tensor = torch.arange(12.0).view(3, 4)
            assert is_finite(tensor.to(dtype))
            tensor.view(-1)[place] = value
            assert not is_finite(tensor.to(dtype))
    assert is_finite(torch.zeros(0, 3, dtype=dtype)) and is_finite(torch.arange(3))


# ---- what there is is read -----------------------------------------------------------------------


def test_a_sample_with_a_picture_alone():
    sample = Reader().read(record_of({".png": PNG}))
    assert (sample.key, sample.caption, sample.facts) == ("bad", "", {})
    assert (sample.latent, sample.text) == (None, None)
    assert torch.equal(sample.image, decode_image(PNG))


def test_the_picture_has_the_size_that_the_model_sees():
    image = torch.randint(0, 256, (3, 40, 64), dtype=torch.uint8)
    parts = {".png": encode_png(image)}
    seen = Reader().image(record_of(parts, (64, 40), target=(16, 24)))
    assert torch.equal(seen, fit_image(image, 16, 24))
    assert torch.equal(Reader().stored_image(record_of(parts, (64, 40), target=(16, 24))), image)
    assert torch.equal(Reader().image(record_of(parts, (64, 40))), image)


def test_a_caption_is_text_without_a_byte_order_mark_and_margins():
    record = record_of({".txt": "\ufeff a caf\u00e9 \n".encode()})
    assert Reader().captions(record, {}) == ["a caf\u00e9"]
    assert Reader().captions(record, {"captions": ["one", "two"]}) == ["one", "two"]
    assert Reader().captions(record, {"captions": []}) == ["a caf\u00e9"]
    assert Reader().captions(record_of({}), {}) == [""]


@pytest.mark.parametrize(
    ("prompt", "facts"),
    [("caption", {"captions": ["fine", "half \ud83d"]}), ("class", {"class": "\ud800"})],
)
def test_half_a_character_which_json_can_spell_is_no_caption(prompt, facts):
    """A tokenizer would end the run."""
    record = record_of({".json": json.dumps(facts).encode()})
    with pytest.raises(BadSample, match="caption is not UTF-8"):
        Reader(prompt).captions(record, Reader().facts(record))


def test_the_caption_that_is_chosen_comes_with_its_embedding():
    texts = {
        f".text{'' if n == 0 else n}.safetensors": save({"hidden": torch.tensor([float(n)])})
        for n in range(3)
    }
    facts = b'{"captions": ["a", "b", "c"]}'
    record = record_of({".png": PNG, ".json": facts, **texts})
    for number, caption in enumerate("abc"):
        sample = Reader().read(record, lambda captions, n=number: n)
        assert (sample.caption, sample.text["hidden"].item()) == (caption, number)


def test_a_class_may_stand_for_the_caption():
    record = record_of({".png": PNG, ".json": b'{"label": 0, "class": "cat"}', ".txt": b"x"})
    assert Reader("label").read(record).caption == "0"
    assert Reader("class").read(record).caption == "cat"
    without = record_of({".png": PNG, ".txt": b"x"})
    with pytest.raises(BadSample, match=r"no class label \(no `label` in the facts\)"):
        Reader("label").read(without)


# ---- files ---------------------------------------------------------------------------------------


def test_a_shard_that_shrank_after_indexing_is_noticed(tmp_path):
    record = write_shard(tmp_path / "a.tar", [make_sample(0)]).record(0)
    os.truncate(tmp_path / "a.tar", 1000)
    with pytest.raises(BadSample, match=r"shard is cut off \(\d+ bytes of \.png expected, 0 there"):
        Reader().image(record)


def test_a_file_that_is_gone_or_cannot_be_read_is_a_bad_sample(tmp_path):
    def where(path: Path) -> Record:
        return Record("a", "a", {".png": Part(path, 0, 10)}, 8, 8)

    with pytest.raises(BadSample, match=r"a: file is missing \(.*nowhere\.png\)"):
        Reader().image(where(tmp_path / "nowhere.png"))
    with pytest.raises(BadSample, match=r"a: cannot be read \(.*Is a directory"):
        Reader().image(where(tmp_path))


def many_shards(folder: Path) -> Iterable[Record]:
    for i in range(8):
        write_shard(folder / f"{i}.tar", [make_sample(i)])
        yield index_shard(folder / f"{i}.tar").record(0)


def test_threads_share_a_reader_over_more_shards_than_it_keeps_open(tmp_path, monkeypatch):
    monkeypatch.setattr(module, "OPEN_FILES", 2)
    records, reader, wrong = list(many_shards(tmp_path)), Reader(), []
    before = len(list(Path("/proc/self/fd").iterdir()))

    def read(seed: int) -> None:
        for record in random.Random(seed).choices(records, k=40):
            if not torch.equal(reader.latent(record), make_sample(int(record.key)).latent):
                wrong.append(record.key)

    threads = [threading.Thread(target=read, args=(seed,)) for seed in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong
    assert len(list(Path("/proc/self/fd").iterdir())) <= before + 2


def test_a_shard_with_pictures_of_others_is_read(tmp_path):
    """JPEG in a member called .webp is still a picture: the first bytes decide."""
    from PIL import Image

    stream = io.BytesIO()
    Image.new("RGB", (16, 8), "red").save(stream, "JPEG")
    made = write_shard(tmp_path / "a.tar", [Packed("a", {".webp": stream.getvalue()}, 16, 8)])
    assert Reader().image(made.record(0)).shape == (3, 8, 16)
