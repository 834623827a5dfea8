"""Text embeddings of single samples, made into what a transformer takes. B samples, L tokens."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any, Literal

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from asymlift.errors import BadData
from asymlift.families.base import Config, Text, setting

Sample = Mapping[str, Tensor]


def _columns(samples: Sequence[Sample]) -> dict[str, list[Tensor]]:
    """Return one list of tensors per key; every sample must have the same keys."""
    keys = list(samples[0])
    for i, sample in enumerate(samples):
        if set(sample) != set(keys):
            raise BadData(
                f"text embeddings do not match: sample 0 has {sorted(keys)}, "
                f"sample {i} has {sorted(sample)}; encode all captions with the same model"
            )
    return {key: [sample[key] for sample in samples] for key in keys}


def stack_text(samples: Sequence[Sample]) -> Text:
    """Stack each tensor over the batch; all samples must have the same shapes."""
    columns = _columns(samples)
    for key, tensors in columns.items():
        for i, tensor in enumerate(tensors):
            if tensor.shape != tensors[0].shape:
                raise BadData(
                    f"text embeddings do not match: `{key}` is {tuple(tensors[0].shape)} in "
                    f"sample 0 and {tuple(tensor.shape)} in sample {i}; "
                    "encode all captions with the same model and the same length"
                )
    return {key: torch.stack(tensors) for key, tensors in columns.items()}


def ragged_text(samples: Sequence[Sample]) -> Text:
    """Keep each (L, ..., width) tensor as it is, since lengths differ; nothing else must."""
    columns = _columns(samples)
    for key, tensors in columns.items():
        for i, tensor in enumerate(tensors):
            if tensor.ndim < 2 or tensor.shape[1:] != tensors[0].shape[1:]:
                raise BadData(
                    f"text embeddings do not match: `{key}` is {tuple(tensors[0].shape)} in "
                    f"sample 0 and {tuple(tensor.shape)} in sample {i}; "
                    "encode all captions with the same model"
                )
    return {key: list(tensors) for key, tensors in columns.items()}


def padded_text(
    key: str,
    mask: str,
    *,
    mask_dtype: torch.dtype = torch.bool,
    side: Literal["left", "right"] = "right",
) -> Callable[[Sequence[Sample]], Text]:
    """Return what pads `key`, (L, ...) of each sample, to the longest, and writes where words are.

    All other tensors are stacked.
    """

    def collate(samples: Sequence[Sample]) -> Text:
        words = [sample[key] for sample in samples]
        for i, tensor in enumerate(words):
            if tensor.shape[1:] != words[0].shape[1:]:
                raise BadData(
                    f"text embeddings do not match: `{key}` is {tuple(words[0].shape)} in "
                    f"sample 0 and {tuple(tensor.shape)} in sample {i}; "
                    "encode all captions with the same model"
                )
        others = stack_text([{k: v for k, v in one.items() if k != key} for one in samples])
        written = [torch.ones(len(one), dtype=mask_dtype, device=one.device) for one in words]
        padded, marks = (pad_sequence(t, True, padding_side=side) for t in (words, written))
        return {**others, key: padded, mask: marks}

    return collate


def words_of(
    key: str, width: str, longest: int
) -> Callable[[Config, int | None], dict[str, tuple[int, ...]]]:
    """Return `text_shapes` of one tensor: so many words, or the longest, as wide as the config has.

    `width` is the config's own name for it.
    """
    return lambda transformer, length: {key: (length or longest, setting(transformer, width))}


def apart(**columns: Tensor) -> list[dict[str, Tensor]]:
    """Return one dict for each prompt, of tensors (B, ...) that all prompts share.

    They are copies, so that one prompt does not keep the memory of the others.
    """
    rows = zip(*columns.values(), strict=True)
    return [{key: row.clone() for key, row in zip(columns, one, strict=True)} for one in rows]


def without_padding(
    key: str, words: Tensor, written: Tensor, most: int | None = None
) -> list[dict[str, Tensor]]:
    """Return one dict for each prompt, (L, ...): where words are written, and of these the first.

    words are (B, longest, ...), written a mask (B, longest).
    """
    return [
        {key: one[mask.bool()][:most].clone()} for one, mask in zip(words, written, strict=True)
    ]


@torch.no_grad()
def encode_words(
    pipeline: Any, prompts: Sequence[str], max_length: int | None = None
) -> list[dict[str, Tensor]]:
    """Embed each prompt, (L, width), what fills it up included; the pipeline says nothing more."""
    words = pipeline.encode_prompt(
        prompt=list(prompts), do_classifier_free_guidance=False, **at_most(max_length)
    )[0]
    return apart(encoder_hidden_states=words)


def stacked(text: Text, key: str) -> Tensor:
    """Return one tensor of a batch, which this family does not keep in a list."""
    found = text[key]
    assert isinstance(found, Tensor)
    return found


def at_most(length: int | None) -> dict[str, int]:
    """The pipelines' argument for so many words; None leaves them their own number."""
    return {} if length is None else {"max_sequence_length": length}


@contextmanager
def tokenizer_length(
    pipeline: Any, length: int | None, attribute: str = "tokenizer_max_length"
) -> Iterator[None]:
    """Some pipelines have the number of words as an attribute, not as an argument."""
    own = getattr(pipeline, attribute)
    setattr(pipeline, attribute, length or own)
    try:
        yield
    finally:
        setattr(pipeline, attribute, own)


@contextmanager
def dtype_without_transformer(pipeline: Any) -> Iterator[None]:
    """Some pipelines cast embeddings to the transformer's dtype, though none was loaded."""
    if pipeline.transformer is not None:
        yield
        return
    pipeline.transformer = SimpleNamespace(dtype=pipeline.text_encoder.dtype)
    try:
        yield
    finally:
        pipeline.transformer = None


def without_words(text: Text) -> Text:
    """Cut collated embeddings (B, L, ...) and masks to none: what a wordless network sees."""
    return {
        key: value[:, :0] if isinstance(value, Tensor) else [part[:0] for part in value]
        for key, value in text.items()
    }


def text_to(text: Text, device: torch.device) -> Text:
    """Move collated embeddings, stacked or ragged."""
    return {
        key: value.to(device) if isinstance(value, Tensor) else [part.to(device) for part in value]
        for key, value in text.items()
    }
