"""From pictures to the samples of one shard: read, brought to size, encoded, packed.

What a shard holds depends on its records and the settings alone, not on who makes it, or when;
to the last bit of a latent only on one kind of machine, with as many threads.

Shapes: image (3, H, W) uint8, latent (C, h, w).
"""

from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby, islice
from typing import Any, TypeVar

import torch
from torch import Tensor

from asymlift.data.ahead import read_ahead
from asymlift.data.buckets import Fit, Refusal, fit_image, place, whole_patches
from asymlift.data.packing import Dtype, pack
from asymlift.data.pictures import (
    decode_image,
    encode_picture,
    image_to_float,
    picture_suffix,
    reads_plainly,
)
from asymlift.data.reader import Reader
from asymlift.data.records import CAPTION, FACTS, LATENT, BadSample, Record, text_suffix
from asymlift.data.writer import Packed, packed_facts
from asymlift.errors import BadData
from asymlift.recipe import PrepareSection

CHUNK = 64  # pictures that are encoded, and in memory, at once
TEXT_CACHE = 1 << 30  # bytes of embeddings that are kept for captions that come again
UNUSABLE_FACTS = ("width", "height", "captions")  # of the source; ours are written instead

Embedding = dict[str, Tensor]
EncodeLatents = Callable[[Tensor], Tensor]  # (B, 3, H, W) in [-1, 1] -> (B, C, h, w)
EncodeTexts = Callable[[Sequence[str]], list[Embedding]]
Item = TypeVar("Item")


@dataclass(frozen=True)
class Picture:
    """One picture as it will be stored, and all that is said of it."""

    record: Record
    image: Tensor  # what a reader of the shard will see
    suffix: str  # "" where the picture itself is not stored again
    data: bytes
    captions: list[str]
    prompts: list[str]  # what the model is trained with: the captions, or the class
    facts: dict[str, Any]

    @property
    def width(self) -> int:
        return self.image.shape[2]

    @property
    def height(self) -> int:
        return self.image.shape[1]


class ShardMaker:
    """Makes samples; one per process, so that a caption is encoded once."""

    def __init__(
        self,
        settings: PrepareSection,
        fit: Fit,
        reader: Reader,
        *,
        as_stored: bool,  # the source was prepared: its pictures keep their size
        encode_latents: EncodeLatents | None,
        encode_texts: EncodeTexts | None,
        workers: int,
        check_stop: Callable[[], None] = lambda: None,  # raises where somebody asked to stop
    ) -> None:
        self.check_stop = check_stop
        self.settings, self.fit, self.reader, self.workers = settings, fit, reader, workers
        self.plain_reader = reader if reader.prompt == "caption" else Reader()
        self.as_stored = as_stored
        self.encode_latents, self.encode_texts = encode_latents, encode_texts
        self.texts = TextCache(TEXT_CACHE)

    def samples(
        self,
        records: Iterable[Record],
        on_bad: Callable[[BadSample], None],
        on_done: Callable[[int], None] = lambda count: None,
    ) -> Iterator[Packed]:
        """The samples that can be used, in the order of their records."""
        for read in batches(self.readings(records), CHUNK):
            yield from self.packed(sound(read, on_bad))
            on_done(len(read))

    def pictures(
        self, records: Iterable[Record], on_bad: Callable[[BadSample], None]
    ) -> Iterator[Picture]:
        """The same before anything is encoded."""
        for read in self.readings(records):
            yield from sound([read], on_bad)

    def readings(self, records: Iterable[Record]) -> Iterator[Picture | BadSample]:
        for read in read_ahead(self.read, records, self.workers):
            self.check_stop()
            yield read

    # ---- one picture -------------------------------------------------------------------------

    def read(self, record: Record) -> Picture | BadSample:
        try:
            return self.picture(record)
        except BadSample as fault:
            return fault

    def picture(self, record: Record) -> Picture:
        facts = self.reader.facts(record)
        captions = self.plain_reader.captions(record, facts)
        prompts = self.reader.captions(record, facts)
        original = self.reader.stored_image(record)
        height, width = original.shape[1:]
        found = (
            whole_patches(width, height, self.fit.patch)
            if self.as_stored
            else place(width, height, self.fit)
        )
        if isinstance(found, Refusal):
            raise BadSample(record.where, found.reason, found.detail)
        suffix, data, image = self.stored(record, original, fit_image(original, *found))
        facts = {k: v for k, v in facts.items() if k not in UNUSABLE_FACTS}
        facts = {"original_width": width, "original_height": height} | facts
        if len(captions) > 1:
            facts["captions"] = captions
        return Picture(record, image, suffix, data, captions, prompts, facts)

    def stored(self, record: Record, original: Tensor, image: Tensor) -> tuple[str, bytes, Tensor]:
        """(suffix, bytes, what these bytes decode to); the source's own bytes where they serve."""
        if self.settings.image == "none":
            if image is not original:
                size = f"{original.shape[2]} x {original.shape[1]}"
                raise BadSample(record.where, "would be resized", f"{size}; prepare.image is none")
            return "", b"", image
        if image is original:
            source = self.reader.bytes_of(record, record.image_suffix or "")
            if reads_plainly(source, image):
                return picture_suffix(source), source, image
        data = encode_picture(image, self.settings.image, self.settings.quality)
        if self.settings.image != "png" and self.encode_latents is not None:
            image = decode_image(data)  # the latent has to be that of the picture as it is stored
        return picture_suffix(data), data, image

    # ---- many at once ------------------------------------------------------------------------

    def packed(self, pictures: Sequence[Picture]) -> Iterator[Packed]:
        latents, texts = self.latents(pictures), self.text_members(pictures)
        for picture, latent, text in zip(pictures, latents, texts, strict=True):
            members = {**plain_members(picture), **latent, **text}
            yield Packed(picture.record.key, members, picture.width, picture.height)

    def latents(self, pictures: Sequence[Picture]) -> list[dict[str, bytes]]:
        """Packed latents, in order; pictures of one size go through the encoder together."""
        if self.encode_latents is None:
            return [{} for _ in pictures]
        made: dict[int, dict[str, bytes]] = {}
        dtype = dtype_of(self.settings.latents)

        def size(number: int) -> tuple[int, ...]:
            return tuple(pictures[number].image.shape[1:])

        for _, same in groupby(sorted(range(len(pictures)), key=size), key=size):
            for some in batches(same, self.settings.batch):
                self.check_stop()
                images = torch.stack([image_to_float(pictures[n].image) for n in some])
                for number, latent in zip(some, self.encode_latents(images), strict=True):
                    where = pictures[number].record.where
                    made[number] = {LATENT: packed_or_said({"latent": latent}, dtype, where)}
        return [made[number] for number in range(len(pictures))]

    def text_members(self, pictures: Sequence[Picture]) -> list[dict[str, bytes]]:
        """Packed embeddings of every prompt of each picture."""
        if self.encode_texts is None:
            return [{} for _ in pictures]
        wanted = list(dict.fromkeys(prompt for picture in pictures for prompt in picture.prompts))
        known = {prompt: data for prompt in wanted if (data := self.texts.get(prompt)) is not None}
        dtype = dtype_of(self.settings.text)
        for some in batches([p for p in wanted if p not in known], self.settings.batch):
            self.check_stop()
            # Always as many at once, or the bits of an embedding would depend on its company.
            filled = [*some, *[""] * (self.settings.batch - len(some))]
            for prompt, embedding in zip(some, self.encode_texts(filled), strict=False):
                tensors = {name: tensor.cpu() for name, tensor in embedding.items()}
                known[prompt] = packed_or_said(tensors, dtype, f"caption {prompt[:60]!r}")
                self.texts.put(prompt, known[prompt])
        return [
            {text_suffix(number): known[prompt] for number, prompt in enumerate(picture.prompts)}
            for picture in pictures
        ]


def plain_members(picture: Picture) -> dict[str, bytes]:
    """What is stored of a picture beside what encoders make of it."""
    if not picture.suffix:
        return {}
    members = {
        picture.suffix: picture.data,
        FACTS: packed_facts(picture.facts, picture.width, picture.height),
    }
    caption = picture.captions[0].encode()
    return members | ({CAPTION: caption} if caption else {})


def sound(
    read: Iterable[Picture | BadSample], on_bad: Callable[[BadSample], None]
) -> list[Picture]:
    pictures = list[Picture]()
    for one in read:
        if isinstance(one, BadSample):
            on_bad(one)
        else:
            pictures.append(one)
    return pictures


def packed_or_said(tensors: Embedding, dtype: Dtype, where: str) -> bytes:
    """One picture or caption of which nothing finite comes is a broken encoder: stop."""
    try:
        return pack(tensors, dtype)
    except BadData as error:
        raise BadData(
            f"{where}: {error}.\nIs the base model whole? A wider prepare.latents or prepare.text "
            "(float32, bfloat16) holds larger numbers"
        ) from None


def batches(items: Iterable[Item], count: int) -> Iterator[list[Item]]:
    coming = iter(items)
    while some := list(islice(coming, count)):
        yield some


def dtype_of(store: str) -> Dtype:
    assert store != "none", "an encoder without anything to store"
    return store  # type: ignore[return-value]


class TextCache:
    """The embeddings of the captions that came last, up to so many bytes."""

    def __init__(self, limit: int) -> None:
        self.limit, self.size = limit, 0
        self.kept: OrderedDict[str, bytes] = OrderedDict()

    def get(self, prompt: str) -> bytes | None:
        if prompt in self.kept:
            self.kept.move_to_end(prompt)
        return self.kept.get(prompt)

    def put(self, prompt: str, data: bytes) -> None:
        self.kept[prompt] = data
        self.size += len(data)
        while self.size > self.limit and len(self.kept) > 1:
            _, dropped = self.kept.popitem(last=False)
            self.size -= len(dropped)
