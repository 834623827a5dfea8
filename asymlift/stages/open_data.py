"""What a recipe's `data` names, opened: shards are indexed by all ranks, pictures listed by one."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from asymlift.data.ahead import read_ahead
from asymlift.data.buckets import Fit
from asymlift.data.catalog import Catalog, Patterns, expand, indexed, listed
from asymlift.data.reader import Reader
from asymlift.data.records import BadSample
from asymlift.data.table import Table
from asymlift.errors import BadData
from asymlift.recipe import DataSection, ResizeSection
from asymlift.runtime import dist
from asymlift.runtime.dist import Ranks
from asymlift.runtime.log import progress, warn

ALONE = Ranks(0, 1, 0)
NAMED = 3  # of the same kind that are named on the screen


def fit_of(resize: ResizeSection, patch: int) -> Fit:
    return Fit(
        sides=tuple(resize.sides),
        patch=patch,
        step=resize.step,
        max_aspect=resize.max_aspect,
        min_side=resize.min_side,
        upscale=resize.upscale,
    )


def reader_of(data: DataSection) -> Reader:
    return Reader(prompt=data.caption.source)


def open_data(patterns: Patterns, data: DataSection, patch: int, ranks: Ranks = ALONE) -> Catalog:
    """A catalog of everything usable; every rank has to call."""
    named = dist.first_does(ranks, lambda: expand(patterns))
    with progress("index shards", len(named.shards)) as ticker:

        def index(shards: Sequence[Path]) -> list[Table]:
            tables = []
            for table in read_ahead(indexed, shards, data.workers):
                tables.append(table)
                ticker.tick()
            return tables

        if ranks.world > 1:  # each its share, so that afterwards all find an index
            dist.all_do(ranks, lambda: index(named.shards[ranks.rank :: ranks.world]))
        tables = dist.all_do(ranks, lambda: index(named.shards))
    pictures = [
        dist.first_does(
            ranks,
            lambda path=path: listed(  # type: ignore[misc]
                path,
                labels=data.caption.labels,
                caption_lines=data.caption.lines,
                workers=data.workers,
            ),
        )
        for path in named.listings
    ]
    catalog = dist.all_do(ranks, lambda: Catalog([*tables, *pictures], fit_of(data.resize, patch)))
    if not len(catalog):
        raise catalog.nothing_left(patterns)
    return catalog


def tell_what_is_left_out(catalog: Catalog) -> None:
    """A warning for each reason, with a few names."""
    for reason, faults in by_reason([*catalog.faults, *catalog.refused]).items():
        more = f" and {len(faults) - NAMED} more" if len(faults) > NAMED else ""
        warn(f"left out, {reason}: {'; '.join(map(str, faults[:NAMED]))}{more}")


def by_reason(faults: Sequence[BadSample]) -> dict[str, list[BadSample]]:
    found: dict[str, list[BadSample]] = {}
    for fault in faults:
        found.setdefault(fault.reason, []).append(fault)
    return found


def check_origin(
    made: Mapping[str, Any] | None, wanted: Mapping[str, Any], data: DataSection, what: str
) -> None:
    """Refuse prepared data whose latents, embeddings or sizes belong to something else."""
    if made is None:
        return
    if "resize" in data.model_fields_set:
        wanted = {**wanted, "resize": data.resize.model_dump()}
    for name, value in wanted.items():
        if name in made and made[name] != value:
            raise BadData(
                f"{what} was prepared with {name} {made[name]},\nbut this recipe has {value}: "
                "prepare it again, or use what it was prepared with"
            )
