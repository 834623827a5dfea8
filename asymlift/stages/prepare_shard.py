"""From pictures to the samples of one shard: read, brought to size, encoded, packed.

What a shard holds depends on its records and the settings alone, not on who makes it, or when.

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

CHUNK = 64  # pictures in memory at once
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
    suffix: str
    data: bytes
    captions: list[str]
    prompts: list[str]  # what the model is trained with: the captions, or the class
    facts: dict[str, Any]


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
    ) -> None:
        self.settings, self.fit, self.reader, self.workers = settings, fit, reader, workers
        self.as_stored = as_stored
        self.encode_latents, self.encode_texts = encode_latents, encode_texts
        self.texts = TextCache(TEXT_CACHE)

    def samples(
        self,
        records: Sequence[Record],
        on_bad: Callable[[BadSample], None],
        on_done: Callable[[int], None] = lambda count: None,
    ) -> Iterator[Packed]:
        """The samples that can be used, in the order of their records."""
        for chunk in batches(records, CHUNK):
            pictures = list[Picture]()
            for read in read_ahead(self.read, chunk, self.workers):
                if isinstance(read, BadSample):
                    on_bad(read)
                else:
                    pictures.append(read)
            yield from self.packed(pictures)
            on_done(len(chunk))

    # ---- one picture -------------------------------------------------------------------------

    def read(self, record: Record) -> Picture | BadSample:
        try:
            return self.picture(record)
        except BadSample as fault:
            return fault

    def picture(self, record: Record) -> Picture:
        facts = self.reader.facts(record)
        captions = Reader(prompt="caption").captions(record, facts)
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
        facts |= {"original_width": width, "original_height": height}
        if len(captions) > 1:
            facts["captions"] = captions
        return Picture(record, image, suffix, data, captions, prompts, facts)

    def stored(self, record: Record, original: Tensor, image: Tensor) -> tuple[str, bytes, Tensor]:
        """(suffix, bytes, what these bytes decode to); the source's own bytes where they serve."""
        source = self.reader.bytes_of(record, record.image_suffix or "")
        if self.settings.image == "none":
            if image is not original:
                size = f"{original.shape[2]} x {original.shape[1]}"
                raise BadSample(record.where, "would be resized", f"{size}; prepare.image is none")
            return "", b"", image
        if image is original and reads_plainly(source, image):
            return picture_suffix(source), source, image
        data = encode_picture(image, self.settings.image, self.settings.quality)
        # The latent has to be that of the picture as it is stored.
        seen = image if self.settings.image == "png" else decode_image(data)
        return picture_suffix(data), data, seen

    # ---- many at once ------------------------------------------------------------------------

    def packed(self, pictures: Sequence[Picture]) -> Iterator[Packed]:
        latents, texts = self.latents(pictures), self.text_members(pictures)
        for picture, latent, text in zip(pictures, latents, texts, strict=True):
            height, width = picture.image.shape[1:]
            members = dict[str, bytes]()
            if picture.suffix:
                members[picture.suffix] = picture.data
                members[FACTS] = packed_facts(picture.facts, width, height)
                members[CAPTION] = picture.captions[0].encode()
            members[LATENT] = latent
            kept = {suffix: data for suffix, data in members.items() if data}
            yield Packed(picture.record.key, kept | text, width, height)

    def latents(self, pictures: Sequence[Picture]) -> list[bytes]:
        """Packed latents, in order; pictures of one size go through the encoder together."""
        if self.encode_latents is None:
            return [b""] * len(pictures)
        made: dict[int, bytes] = {}
        dtype = dtype_of(self.settings.latents)

        def size(number: int) -> tuple[int, ...]:
            return tuple(pictures[number].image.shape[1:])

        for _, same in groupby(sorted(range(len(pictures)), key=size), key=size):
            for some in batches(same, self.settings.batch):
                images = torch.stack([image_to_float(pictures[n].image) for n in some])
                for number, latent in zip(some, self.encode_latents(images), strict=True):
                    if not torch.isfinite(latent).all():
                        where = pictures[number].record.where
                        raise BadData(f"{where}: the VAE makes NaN or infinity of this picture")
                    made[number] = pack({"latent": latent.cpu()}, dtype)
        return [made[number] for number in range(len(pictures))]

    def text_members(self, pictures: Sequence[Picture]) -> list[dict[str, bytes]]:
        """Packed embeddings of every prompt of each picture."""
        if self.encode_texts is None:
            return [{} for _ in pictures]
        wanted = list(dict.fromkeys(prompt for picture in pictures for prompt in picture.prompts))
        known = {prompt: data for prompt in wanted if (data := self.texts.get(prompt)) is not None}
        dtype = dtype_of(self.settings.text)
        for some in batches([p for p in wanted if p not in known], self.settings.batch):
            # Always as many at once, or the bits of an embedding would depend on its company.
            filled = [*some, *[""] * (self.settings.batch - len(some))]
            for prompt, embedding in zip(some, self.encode_texts(filled), strict=False):
                known[prompt] = pack({k: v.cpu() for k, v in embedding.items()}, dtype)
                self.texts.put(prompt, known[prompt])
        return [
            {text_suffix(number): known[prompt] for number, prompt in enumerate(picture.prompts)}
            for picture in pictures
        ]


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
