"""What a recipe's `data` names, opened: shards are indexed by all ranks, pictures listed by one."""

from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from asymlift.data.ahead import read_ahead
from asymlift.data.buckets import Fit
from asymlift.data.catalog import Catalog, Listed, Patterns, expand, indexed, listed
from asymlift.data.overlay import Caches, caches_of, overlaid
from asymlift.data.reader import Reader
from asymlift.data.records import BadSample
from asymlift.data.table import Table
from asymlift.errors import BadData
from asymlift.recipe import DataSection, ResizeSection
from asymlift.runtime import dist
from asymlift.runtime.dist import Ranks
from asymlift.runtime.log import progress, warn

ALONE = Ranks(0, 1, 0)
NAMED = 2  # of one kind that are named on the screen


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
    sources: list[Table | Listed] = [*index_shards(named.shards, data, ranks)]
    for path in named.listings:
        sources.append(dist.first_does(ranks, partial(list_pictures_of, path, data)))
    newer = open_caches(data, ranks)
    fit = fit_of(data.resize, patch)
    catalog = dist.all_do(
        ranks, lambda: Catalog([overlaid(s, newer) if newer else s for s in sources], fit)
    )
    if not len(catalog):
        raise catalog.nothing_left(patterns)
    return catalog


def index_shards(shards: Sequence[Path], data: DataSection, ranks: Ranks) -> list[Table]:
    """The index of every shard, made by all ranks together where there is none."""
    share = shards[ranks.rank :: ranks.world] if ranks.world > 1 else []
    with progress("index shards", len(share) + len(shards)) as ticker:

        def index(some: Sequence[Path]) -> list[Table]:
            tables = []
            for table in read_ahead(indexed, some, data.workers):
                tables.append(table)
                ticker.tick()
            return tables

        if ranks.world > 1:  # each its share, so that afterwards all find an index
            dist.all_do(ranks, lambda: index(share))
        return dist.all_do(ranks, lambda: index(shards))


def list_pictures_of(path: Path, data: DataSection) -> Listed:
    with progress(f"measure pictures of {path}", 0) as ticker:
        return listed(
            path,
            labels=data.caption.labels,
            caption_lines=data.caption.lines,
            workers=data.workers,
            on_done=ticker.tick,
        )


def open_caches(data: DataSection, ranks: Ranks) -> Caches | None:
    """The newer latents and embeddings that `data.cache` names."""
    if data.cache is None:
        return None
    patterns = data.cache
    named = dist.first_does(ranks, lambda: expand(patterns))
    if named.listings:
        raise BadData(f"data.cache: {named.listings[0]} is no shard, nor a folder of shards")
    tables = index_shards(named.shards, data, ranks)
    return dist.all_do(ranks, lambda: caches_of(tables))


def tell_what_is_left_out(catalog: Catalog) -> None:
    """A warning for each reason, with a few names."""
    for line in lines_by_reason([*catalog.faults, *catalog.refused]):
        warn(line)


def lines_by_reason(faults: Sequence[BadSample]) -> list[str]:
    """`3 left out, too small: a.png (20 x 20, ...), b.png (...) and 1 more`: the most first."""
    lines = []
    for reason, some in by_reason(faults).items():
        names = ", ".join(fault.place for fault in some[:NAMED])
        more = f" and {len(some) - NAMED} more" if len(some) > NAMED else ""
        lines.append(f"{weight(some)} left out, {reason}: {names}{more}")
    return lines


def by_reason(faults: Sequence[BadSample]) -> dict[str, list[BadSample]]:
    """The faults of each reason, the reason that costs most samples first."""
    found: dict[str, list[BadSample]] = {}
    for fault in faults:
        found.setdefault(fault.reason, []).append(fault)
    return dict(sorted(found.items(), key=lambda item: -weight(item[1])))


def weight(faults: Sequence[BadSample]) -> int:
    return sum(fault.count for fault in faults)


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
