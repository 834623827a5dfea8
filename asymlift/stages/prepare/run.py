"""prepare: pictures with captions -> shards with cached latents and text embeddings.

    sources -> hash order -> shards, each whole or absent -> manifest.json, report, contact sheet

Tasks share the work without talking to each other: each makes the shards of its number, and the
one that finds all of them there finishes.
"""

import shutil
import time
from collections.abc import Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

from asymlift.artifacts.files import Busy, exclusive_lock, plural, write_bytes_atomically, writing
from asymlift.data.records import BadSample
from asymlift.data.writer import Packed, write_shard
from asymlift.errors import BadRecipe, StoppedEarly, Unavailable
from asymlift.report.prepare_report import PrepareReport
from asymlift.runtime.log import Ticker, progress, say
from asymlift.stages.prepare.finish import (
    finish,
    finished,
    is_whole,
    lines_of,
    refuse_strangers,
    rejects_of,
    remove_ours,
)
from asymlift.stages.prepare.job import Job
from asymlift.stages.prepare.work import Layout, agreed_layout, scratch

PATIENCE = 3600.0  # seconds without any progress after which the first task stops waiting
POLL = 1.0


@dataclass(frozen=True)
class Share:
    """One task among all; of those that a launcher started together, the first one finishes."""

    number: int = 0
    of: int = 1
    together: bool = False


def prepare(job: Job, share: Share, *, overwrite: bool) -> PrepareReport:
    """Make this task's shards; whoever finds all there finishes."""
    refuse_strangers(job.out)
    if overwrite:
        if share.of > 1:
            raise BadRecipe(
                f"--overwrite would remove what other tasks make: remove {job.out} and "
                f"{scratch(job.out)} first, then start the tasks"
            )
        remove_ours(job.out)
    done = finished(job)
    if done is not None:
        return done
    layout = agreed_layout(job.out, job.plan, job.per_shard)
    with locked(job, f"task-{share.number}-of-{share.of}", f"this share of {job.out}"):
        made = make_shards(job, layout, share)
    missing = missing_shards(job, layout)
    if share.together and share.number == 0:
        wait_for_others(job, layout, missing)
    elif missing or share.together:
        return unfinished(job, layout, made, len(missing))
    try:
        with locked(job, "finish", f"finishing {job.out}"):
            report = finished(job) or finish(job, layout, made)
    except Busy:  # two tasks saw the last shard at once
        return unfinished(job, layout, made, 0)
    shutil.rmtree(scratch(job.out), ignore_errors=True)
    return report


def locked(job: Job, name: str, purpose: str) -> AbstractContextManager[Any]:
    folder = scratch(job.out)
    with writing(folder):
        folder.mkdir(parents=True, exist_ok=True)  # whoever finished has removed it
    return exclusive_lock(folder / f"{name}.lock", purpose)


def unfinished(job: Job, layout: Layout, num_made: int, num_missing: int) -> PrepareReport:
    return PrepareReport(
        out=job.out,
        complete=False,
        num_shards=layout.num_shards,
        num_missing=num_missing,
        num_made=num_made,
    )


def missing_shards(job: Job, layout: Layout) -> list[int]:
    return [n for n in range(layout.num_shards) if not is_whole(job, layout, n)]


def wait_for_others(job: Job, layout: Layout, missing: list[int]) -> None:
    """Until every shard is there."""
    if missing:
        say(f"waiting for {plural(len(missing), 'shard')} of the other tasks")
    seen, since = (0, 0), time.monotonic()
    while missing:
        parts = job.out.glob(".*.part")
        now = len(missing), sum(part.stat().st_size for part in parts if part.exists())
        if now != seen:
            seen, since = now, time.monotonic()
        if time.monotonic() - since > PATIENCE:
            raise StoppedEarly(
                f"{job.out}: {plural(len(missing), 'shard')} of other tasks missing, and nothing "
                f"has come for {PATIENCE:.0f} s; look what became of them, then run the same again"
            )
        job.check_stop()
        time.sleep(POLL)
        missing = [number for number in missing if not is_whole(job, layout, number)]


def make_shards(job: Job, layout: Layout, share: Share) -> int:
    """The shards of one task that are not there yet; how many were made."""
    mine = range(share.number, layout.num_shards, share.of)
    missing = [number for number in mine if not is_whole(job, layout, number)]
    total = sum(len(layout.places(number)) for number in mine)
    to_do = sum(len(layout.places(number)) for number in missing)
    with progress("prepare", total, total - to_do) as ticker:
        for number in missing:
            job.check_stop()
            samples = one_shard(job, layout, number, ticker)
            table = write_shard(layout.path(job.out, number), samples, made=job.made)
            ticker.tick(0, f"{table.path.name}: {plural(len(table), 'sample')}")
    return len(missing)


def one_shard(job: Job, layout: Layout, number: int, ticker: Ticker) -> Iterator[Packed]:
    """A shard's samples; the list of what was left out is written before the shard is committed."""
    rejected: list[BadSample] = []
    records = (job.work.record(place) for place in layout.places(number))
    yield from job.maker.samples(records, rejected.append, ticker.tick)
    if any(fault.reason == "file is missing" for fault in rejected):
        refuse_to_go_without_source(job)
    write_bytes_atomically(rejects_of(job.out, number), lines_of(rejected))


def refuse_to_go_without_source(job: Job) -> None:
    """One missing file is a reject; with the whole source gone, all that follow would be."""
    for source in job.work.sources:
        if not source.path.exists():
            raise Unavailable(
                f"{source.path}: the source is gone. Finished shards are kept: bring it back and "
                "run the same command again"
            )
