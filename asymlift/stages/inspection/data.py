"""What training data are: shards, folders and tables of pictures, from indexes and headers.

Only one sample is decoded, and those that are shown.
"""

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from asymlift.artifacts.files import human_bytes, write_bytes_atomically, writing
from asymlift.data.ahead import read_ahead
from asymlift.data.buckets import Refusal, place, suggestion
from asymlift.data.catalog import (
    NO_IMAGE,
    TABLES,
    Catalog,
    Listed,
    Source,
    expand,
    indexed,
    listed,
    shards_in,
)
from asymlift.data.reader import Reader
from asymlift.data.records import CAPTION, FACTS, IMAGE_SUFFIXES, LATENT, TEXT, BadSample, Record
from asymlift.data.table import Table
from asymlift.errors import BadData, CannotWrite
from asymlift.recipe import ResizeSection
from asymlift.report.contact_sheet import contact_sheet
from asymlift.report.prepare_report import told
from asymlift.runtime.log import progress
from asymlift.stages.inspection.report import SHOWN, Inspection, brief, some_of
from asymlift.stages.open_data import by_reason, fit_of, lines_by_reason

PICTURES = 64  # on a contact sheet
WORKERS = 4
RESIZE = ResizeSection()  # what a recipe that says nothing has
FIT = fit_of(RESIZE, 1)  # patches of one pixel: no family is known here
SMALLER = tuple(2**n for n in range(3, 11))  # for a look at pictures of any size


def is_data(path: Path) -> bool:
    """Whether something is a shard or a table, or a folder with shards or pictures in it."""
    if path.is_file():
        return path.suffix.lower() in (".tar", *TABLES)
    return bool(shards_in(path)) or any(
        found.suffix.lower() in IMAGE_SUFFIXES for found in path.rglob("*")
    )


def inspect_data(path: Path, picture: Path | None = None) -> Inspection:
    """Say what is in it; `picture` is where a contact sheet goes."""
    if picture is not None:
        check_picture(picture)
    sources = open_sources(path)
    catalog = Catalog(sources, replace(FIT, sides=SMALLER, upscale=True))
    if picture is not None:
        write_contact_sheet(catalog, path, picture)
    members = members_of(sources)
    # Newer latents or embeddings, whose pictures lie elsewhere.
    cache = catalog.made is not None and not any(suffix in IMAGE_SUFFIXES for suffix in members)
    faults = [*catalog.faults, *catalog.refused]
    if cache:
        faults = [fault for fault in faults if fault.reason != NO_IMAGE]
    sizes = sizes_of(sources)
    num_bytes = sum(size for _, size in members.values())
    rows = [
        ("samples", f"{counted(sources)}, {human_bytes(num_bytes)}"),
        *((f"*{s}", f"{count}, {human_bytes(size)}") for s, (count, size) in members.items()),
        (
            "image sizes" if catalog.made is None else "buckets",
            some_of(f"{w} x {h} ({count})" for (w, h), count in sizes.most_common()),
        ),
        *([("pictures", "none: data.cache takes it")] if cache else []),
        *fitting(sources),
        *((f"made with {name}", told(said)) for name, said in (catalog.made or {}).items()),
    ]
    problems = [
        *lines_by_reason(faults)[:SHOWN],
        *incomplete(catalog, CAPTION, "a caption"),
        *incomplete(catalog, LATENT, "a latent"),
        *incomplete(catalog, TEXT, "a text embedding"),
    ]
    facts: dict[str, Any] = {
        "num_shards": sum(isinstance(source, Table) for source in sources),
        "num_samples": sum(map(len, sources)) if cache else len(catalog),
        "num_lost": 0 if cache else catalog.num_lost,
        "members": {suffix: count for suffix, (count, _) in members.items()},
        "bytes": {suffix: size for suffix, (_, size) in members.items()},
        "sizes": [[w, h, count] for (w, h), count in sizes.most_common()],
        "made": catalog.made,
        "left_out": {
            reason: {"count": sum(fault.count for fault in faults), "first": str(faults[0])}
            for reason, faults in by_reason(faults).items()
        },
    }
    if cache or len(catalog):
        first = next(s for s in sources if len(s)).record(0) if cache else catalog[0]
        try:
            more_rows, facts["first"] = first_sample(first)
            rows += more_rows
        except BadSample as fault:
            problems.append(str(fault))
    if picture is not None:
        rows.append(("contact sheet", str(picture)))
    return Inspection(kind_of(path), path.name, rows, facts, problems)


def kind_of(path: Path) -> str:
    if path.is_file():
        return "shard" if path.suffix == ".tar" else "table of pictures"
    return "shards" if shards_in(path) else "folder of pictures"


def open_sources(path: Path) -> list[Source]:
    named, sources = expand(path), list[Source]()
    with progress("index shards", len(named.shards)) as ticker:
        for table in read_ahead(partial(indexed, beside=False), named.shards, WORKERS):
            sources.append(table)
            ticker.tick()
    return sources + [listed(listing, workers=WORKERS) for listing in named.listings]


# ---- numbers -----------------------------------------------------------------------------------


def counted(sources: Sequence[Source]) -> str:
    number = sum(map(len, sources))
    shards = sum(isinstance(source, Table) for source in sources)
    about = [str(source.facts["about"]) for source in sources if isinstance(source, Listed)]
    return "; ".join([f"{number} in {shards} shards" if shards > 1 else str(number), *about])


def members_of(sources: Sequence[Source]) -> dict[str, tuple[int, int]]:
    """Suffix -> how many there are, and their bytes."""
    counts, sizes = Counter[str](), Counter[str]()
    for source in sources:
        if isinstance(source, Table):
            for suffix, span in source.spans.items():
                there = span[:, 0] >= 0
                counts[suffix] += int(there.sum())
                sizes[suffix] += int(span[there, 1].sum())
        elif isinstance(source, Listed):
            for record in source.records:
                counts.update(record.parts.keys())
                sizes.update({suffix: part.size for suffix, part in record.parts.items()})
    return {suffix: (counts[suffix], sizes[suffix]) for suffix in sorted(counts)}


def sizes_of(sources: Iterable[Source]) -> Counter[tuple[int, int]]:
    """(width, height) of the stored images -> how many."""
    found = Counter[tuple[int, int]]()
    for source in sources:
        sizes = source.sizes[source.sizes[:, 0] > 0]
        different, counts = np.unique(sizes, axis=0, return_counts=True)
        for (width, height), count in zip(different.tolist(), counts.tolist(), strict=True):
            found[width, height] += count
    return found


def fitting(sources: Sequence[Source]) -> list[tuple[str, str]]:
    """How pictures that nobody prepared fit the sizes that a recipe has by default."""
    free = [s for s in sources if s.made is None and not s.has(LATENT).any()]
    sizes = sizes_of(free)
    if not sizes:
        return []
    buckets, refused = Counter[tuple[int, int]](), list[tuple[int, int]]()
    for (width, height), count in sizes.items():
        bucket = place(width, height, FIT)
        if isinstance(bucket, Refusal):
            refused += [(width, height)] * count
        else:
            buckets[bucket] += count
    found = [f"{sum(buckets.values())} of {sizes.total()} usable"]
    if buckets:
        found.append(some_of(f"{w} x {h} ({n})" for (h, w), n in buckets.most_common()))
    if refused:
        found.append(suggestion(refused, FIT))
    return [(f"at data.resize.sides {RESIZE.sides}", "; ".join(found))]


def incomplete(catalog: Catalog, suffix: str, meaning: str) -> list[str]:
    have = int(catalog.has(suffix).sum())
    few = 0 < have < len(catalog)
    return [f"only {have} of {len(catalog)} samples have {meaning}"] if few else []


# ---- samples -----------------------------------------------------------------------------------


def first_sample(record: Record) -> tuple[list[tuple[str, str]], dict[str, Any]]:
    """The parts of one sample."""
    reader = Reader()
    facts = reader.facts(record)
    captions = reader.captions(record, facts) if record.image_suffix else []
    tensors = {"image": reader.stored_image(record)} if record.image_suffix else {}
    latent, text = reader.latent(record), reader.text(record)
    tensors |= {"latent": latent} if latent is not None else {}
    tensors |= {f"text {name}": tensor for name, tensor in (text or {}).items()}
    shapes = {
        name: (str(tensor.dtype).removeprefix("torch."), list(tensor.shape))
        for name, tensor in tensors.items()
    }
    rows = [
        ("first key", record.key),
        *(("its caption", caption or "none") for caption in captions),
        *((f"its {name}", f"{shape} {dtype}") for name, (dtype, shape) in shapes.items()),
        *((f"its {name}", brief(str(value))) for name, value in plain(facts).items()),
    ]
    found = {"key": record.key, "captions": captions, "tensors": shapes}
    return rows, found | ({"facts": facts} if FACTS in record.parts else {})


def plain(facts: Mapping[str, Any]) -> dict[str, Any]:
    """Facts that are not shown already."""
    return {k: v for k, v in facts.items() if k not in ("width", "height", "captions")}


def check_picture(picture: Path) -> None:
    """Before anything is read: whether a contact sheet can go there."""
    if picture.suffix.lower() != ".png" or picture.is_dir():
        raise CannotWrite(f"--picture {picture}: name a file that ends in .png")
    with writing(picture):
        picture.parent.mkdir(parents=True, exist_ok=True)


def write_contact_sheet(catalog: Catalog, path: Path, picture: Path) -> None:
    """Some samples as the model will see them, always the same ones of the same keys."""
    reader, shown = Reader(), []
    for record in catalog.lowest_hashes(PICTURES):
        try:
            caption = reader.captions(record, reader.facts(record))[0]
            shown.append((reader.image(record), caption))
        except BadSample:
            continue  # one that verify will name
    if not shown:
        raise BadData(f"{path}: none of its pictures can be shown")
    write_bytes_atomically(picture, contact_sheet(shown))
