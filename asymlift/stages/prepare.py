"""prepare: pictures with captions -> shards with cached latents and text embeddings.

    sources -> hash order -> shards, each whole or absent -> manifest.json, report, contact sheet

Tasks share the work without talking to each other: each makes the shards of its number, and the
one that finds all of them there finishes.
"""

import json
import re
import shutil
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from asymlift.artifacts.diffusers_folder import DiffusersFolder
from asymlift.artifacts.files import (
    exclusive_lock,
    free_bytes,
    human_bytes,
    write_bytes_atomically,
    writing,
)
from asymlift.artifacts.manifest import NAME as MANIFEST
from asymlift.artifacts.manifest import read_manifest, write_manifest
from asymlift.data.buckets import suggestion
from asymlift.data.catalog import expand
from asymlift.data.reader import Reader
from asymlift.data.records import IMAGE_SUFFIXES, LATENT, BadSample, Record
from asymlift.data.table import Table, index_path, load_table
from asymlift.data.writer import Packed, write_shard
from asymlift.errors import BadData, BadRecipe, CannotWrite, StoppedEarly
from asymlift.families.base import Family, Geometry
from asymlift.recipe import PrepareSection, Recipe
from asymlift.report.prepare_report import PrepareReport, prepare_page
from asymlift.runtime.log import Ticker, progress, say
from asymlift.stages.open_data import fit_of, reader_of
from asymlift.stages.prepare_shard import Embedding, ShardMaker
from asymlift.stages.prepare_work import (
    Layout,
    agreed_layout,
    class_names,
    find_work,
    plan_for,
    refuse_others,
    scratch,
)

LOOKED_AT = 16  # samples that the estimate is made from
MOST_LOOKED_AT = 512  # where many cannot be used
SHOWN = 64  # pictures on the contact sheet
PATIENCE = 3600.0  # seconds without a new shard after which the first task stops waiting
POLL = 1.0
REJECTED, PAGE, SHEET = "rejected.jsonl", "prepare-report.html", "contact-sheet.png"
BLOCK = 512  # of a tar: a header for each member, and its data in whole blocks
OURS = re.compile(r"\d{6,}\.(tar|index\.safetensors)|\..*\.part|\.\d.*")

Stop = Callable[[], bool]


@dataclass(frozen=True)
class Estimate:
    """What shards will take, by what a few samples took."""

    num_pictures: int
    num_looked_at: int
    num_usable: int  # of those
    bytes_per_sample: dict[str, float]  # image, captions and facts, latent, text, tar
    per_sample: float
    total: float
    free: int
    buckets: dict[str, int] = field(default_factory=dict)  # "width x height" -> of those


@dataclass(frozen=True)
class Share:
    """One task among all; of those that a launcher started together, the first one finishes."""

    number: int = 0
    of: int = 1
    together: bool = False


class Encoders:
    """The base's VAE and text encoders, loaded when they are first needed."""

    def __init__(
        self, base: Path, family: Family, text_length: int | None, device: torch.device
    ) -> None:
        self.base, self.family, self.device = base, family, device
        self.text_length = text_length

    @cached_property
    def vae(self) -> Any:
        from asymlift.model.loading import load_pipeline_parts

        vae = load_pipeline_parts(self.base, ["vae"], dtype=torch.float32)["vae"]
        return vae.requires_grad_(False).to(self.device)

    @cached_property
    def pipeline(self) -> Any:
        from asymlift.model.loading import load_pipeline

        pipeline = load_pipeline(self.base)
        for name, part in pipeline.components.items():
            if isinstance(part, torch.nn.Module) and name != "vae":
                part.to(self.device)
        return pipeline

    @torch.inference_mode()
    def latents(self, images: Tensor) -> Tensor:
        return self.family.encode_latents(self.vae, images.to(self.device)).float().cpu()

    @torch.inference_mode()
    def texts(self, prompts: Sequence[str]) -> list[Embedding]:
        return self.family.encode_prompt(self.pipeline, prompts, self.text_length)


class Job:
    """A recipe's preparation: what it reads, what it makes, and how."""

    def __init__(
        self, recipe: Recipe, base: Path, family: Family, geometry: Geometry, device: torch.device
    ) -> None:
        self.recipe, self.settings = recipe, settings_of(recipe)
        self.out = Path(self.settings.out)
        refuse_nesting(self.settings, self.out)
        with progress("list pictures", 0) as ticker:
            self.work = find_work(recipe, ticker.tick)
        if self.work.made is None and self.settings.image == "none":
            raise BadRecipe("prepare.image: none is for a source of shards that were prepared")
        self.fit = fit_of(recipe.data.resize, geometry.pixel_patch)
        self.encoders = Encoders(base, family, recipe.model.text_length, device)
        self.made = self.origin(base, family)
        with_latents, with_text = self.settings.latents != "none", self.settings.text != "none"
        self.maker = ShardMaker(
            self.settings,
            self.fit,
            reader_of(recipe.data),
            as_stored=self.work.made is not None,
            encode_latents=self.encoders.latents if with_latents else None,
            encode_texts=self.encoders.texts if with_text else None,
            workers=recipe.data.workers,
        )

    def origin(self, base: Path, family: Family) -> dict[str, Any]:
        """What the samples come from, for those who will read them."""
        folder, use, data = DiffusersFolder(base), self.settings, self.recipe.data
        before = self.work.made
        made: dict[str, Any] = {"family": family.name}
        made["resize"] = before["resize"] if before else data.resize.model_dump()
        if use.latents != "none":
            made |= {"latents": use.latents, "vae": folder.fingerprint("vae")}
        if use.text != "none":
            made |= {
                "text": use.text,
                "text encoders": folder.text_fingerprint(),
                "text length": self.recipe.model.text_length,
                "prompt": data.caption.source,
            }
        return made

    @cached_property
    def plan(self) -> dict[str, Any]:
        use = self.settings
        cut = {"shard_samples": use.shard_samples, "shard_bytes": use.shard_bytes}
        cut = {name: value for name, value in cut.items() if value is not None}
        form = {"image": use.image, "quality": use.quality, "batch": use.batch}
        return plan_for({**self.made, **form, **cut}, self.work)

    def estimate(self) -> Estimate:
        """Make a few samples, and weigh them."""
        looked, weights, buckets = 0, list[dict[str, int]](), Counter[str]()
        bad: list[BadSample] = []
        while len(weights) < LOOKED_AT and looked < min(MOST_LOOKED_AT, len(self.work)):
            until = min(looked + LOOKED_AT, len(self.work))
            records = [self.work.record(place) for place in range(looked, until)]
            for packed in self.maker.samples(records, bad.append):
                weights.append(weigh(packed))
                buckets[f"{packed.width} x {packed.height}"] += 1
            looked = until
        if not weights:
            raise self.nothing_usable(bad)
        parts = {name: sum(w[name] for w in weights) / len(weights) for name in weights[0]}
        per_sample = sum(parts.values())
        return Estimate(
            num_pictures=len(self.work),
            num_looked_at=looked,
            num_usable=len(weights),
            bytes_per_sample=parts,
            per_sample=per_sample,
            total=per_sample * len(self.work) * len(weights) / looked,
            free=free_bytes(self.out),
            buckets=dict(buckets.most_common()),
        )

    def per_shard(self) -> int:
        """Samples per shard, by weight; refuses to begin what the disk cannot hold."""
        found = self.estimate()
        say(
            f"about {human_bytes(found.per_sample)} a sample, {human_bytes(found.total)} in all; "
            f"{human_bytes(found.free)} free"
        )
        if found.total > found.free:
            raise CannotWrite(
                f"{self.out}: the shards will take about {human_bytes(found.total)}, but only "
                f"{human_bytes(found.free)} are free. Choose another prepare.out, or store less "
                "(prepare.text, prepare.latents)"
            )
        wanted = self.settings.shard_samples
        return wanted or max(1, round(self.settings.shard_bytes / found.per_sample))

    def nothing_usable(self, bad: Sequence[BadSample]) -> BadData:
        reasons = Counter(fault.reason for fault in bad)
        said = "; ".join(f"{reason}: {count}" for reason, count in reasons.most_common(3))
        lines = [f"{self.settings.source}: none of {len(bad)} pictures can be used ({said})"]
        if too_small := [fault for fault in bad if fault.reason == "too small"]:
            lines.append(str(too_small[0]))
            lines.append(suggestion([size_in(fault) for fault in too_small], self.fit))
        else:
            lines += [str(fault) for fault in bad[:2]]
        return BadData("\n".join(lines))


def size_in(fault: BadSample) -> tuple[int, int]:
    """The (width, height) that a refusal begins with."""
    width, height = re.findall(r"\d+", fault.detail)[:2]
    return int(width), int(height)


def settings_of(recipe: Recipe) -> PrepareSection:
    if recipe.prepare is None:
        raise BadRecipe(
            "the recipe has no `prepare` section: say `source` (a folder, a table, shards) and "
            "`out` (the folder for the shards)"
        )
    return recipe.prepare


def refuse_nesting(settings: PrepareSection, out: Path) -> None:
    for path in expand(settings.source).listings:
        folder = path if path.is_dir() else path.parent
        if out.resolve().is_relative_to(folder.resolve()) and path.is_dir():
            raise BadRecipe(f"prepare.out: {out} is inside the source {path}; put it elsewhere")


def weigh(packed: Packed) -> dict[str, int]:
    """Bytes of a sample in a tar, by what they are for."""
    parts = {"image": 0, "captions and facts": 0, "latent": 0, "text": 0, "tar": 0}
    for suffix, data in packed.members.items():
        if suffix in IMAGE_SUFFIXES:
            name = "image"
        elif suffix == LATENT:
            name = "latent"
        else:
            name = "text" if suffix.endswith(".safetensors") else "captions and facts"
        parts[name] += len(data)
        parts["tar"] += BLOCK + -len(data) % BLOCK
    return parts


# ---- making shards -----------------------------------------------------------------------------


def prepare(job: Job, share: Share, *, overwrite: bool, stop: Stop) -> PrepareReport:
    """Make this task's shards; whoever finds all there finishes."""
    refuse_strangers(job.out)
    if overwrite:
        remove_ours(job.out, share)
    done = finished(job)
    if done is not None:
        return done
    layout = agreed_layout(job.out, job.plan, job.per_shard)
    lock = scratch(job.out) / f"task-{share.number}-of-{share.of}.lock"
    with exclusive_lock(lock, f"this share of {job.out}"):
        made = make_shards(job, layout, share, stop)
    missing = missing_shards(job.out, layout)
    if missing and share.together and share.number == 0:
        missing = wait_for_others(job.out, layout, missing, stop)
    if missing or (share.together and share.number > 0):
        return PrepareReport(
            out=job.out,
            complete=False,
            num_shards=layout.num_shards,
            num_missing=len(missing),
            num_made=made,
        )
    with exclusive_lock(scratch(job.out) / "finish.lock", f"finishing {job.out}"):
        report = finished(job) or finish(job, layout, made)
    shutil.rmtree(scratch(job.out), ignore_errors=True)
    return report


def missing_shards(out: Path, layout: Layout) -> list[int]:
    return [n for n in range(layout.num_shards) if whole(layout.path(out, n)) is None]


def wait_for_others(out: Path, layout: Layout, missing: list[int], stop: Stop) -> list[int]:
    """Until every shard is there, or nothing has come for long."""
    say(f"waiting for {len(missing)} shards of the other tasks")
    since = time.monotonic()
    while missing and time.monotonic() - since < PATIENCE and not stop():
        time.sleep(POLL)
        still = [number for number in missing if whole(layout.path(out, number)) is None]
        if len(still) < len(missing):
            since = time.monotonic()
        missing = still
    return missing


def make_shards(job: Job, layout: Layout, share: Share, stop: Stop) -> int:
    """The shards of one task that are not there yet; how many were made."""
    mine = range(share.number, layout.num_shards, share.of)
    missing = [number for number in mine if whole(layout.path(job.out, number)) is None]
    total = sum(len(layout.places(number)) for number in mine)
    to_do = sum(len(layout.places(number)) for number in missing)
    with progress("prepare", total, total - to_do) as ticker:
        for number in missing:
            table = write_shard(
                layout.path(job.out, number),
                one_shard(job, layout, number, ticker, stop),
                made=job.made,
            )
            ticker.tick(0, f"{table.path.name}: {len(table)} samples")
    return len(missing)


def one_shard(
    job: Job, layout: Layout, number: int, ticker: Ticker, stop: Stop
) -> Iterator[Packed]:
    """A shard's samples; the list of what was left out is written before the shard is committed."""
    rejected: list[BadSample] = []

    def on_done(count: int) -> None:
        ticker.tick(count)
        if stop():
            raise StoppedEarly("stopped; finished shards are kept: run the same command to go on")

    records = [job.work.record(place) for place in layout.places(number)]
    yield from job.maker.samples(records, rejected.append, on_done)
    write_bytes_atomically(rejects_of(job.out, number), lines_of(rejected))


def rejects_of(out: Path, number: int) -> Path:
    return scratch(out) / f"rejected-{number:06d}.jsonl"


def lines_of(rejected: Sequence[BadSample]) -> bytes:
    lines = [
        json.dumps({"sample": fault.where, "reason": fault.reason, "detail": fault.detail})
        for fault in rejected
    ]
    return "".join(f"{line}\n" for line in lines).encode()


def whole(path: Path) -> Table | None:
    """The index of a shard that was written to its end."""
    table = load_table(path, index_path(path))
    if table is None or not path.is_file():
        return None
    return table if table.facts.get("bytes") == path.stat().st_size else None


# ---- finishing ---------------------------------------------------------------------------------


def finish(job: Job, layout: Layout, num_made: int) -> PrepareReport:
    """The lists, the pictures for people, and at last the manifest, which makes all of it whole."""
    out = job.out
    for leftover in out.glob(".*"):
        leftover.unlink()
    tables = [t for n in range(layout.num_shards) if (t := whole(layout.path(out, n)))]
    if not any(len(table) for table in tables):
        raise job.nothing_usable(read_rejects(out, layout))
    rejected = [*job.work.faults, *read_rejects(out, layout)]
    write_bytes_atomically(out / REJECTED, lines_of(rejected))
    report = PrepareReport(
        out=out,
        complete=True,
        num_shards=len(tables),
        num_made=num_made,
        num_samples=sum(len(table) for table in tables),
        num_bytes=sum(table.facts["bytes"] for table in tables),
        buckets=count_buckets(tables),
        bytes_per_part=count_bytes(tables),
        rejected=dict(Counter(fault.reason for fault in rejected).most_common()),
        rejected_samples=[str(fault) for fault in rejected[:SHOWN]],
        made=job.made,
        class_names=class_names(job.work),
    )
    from asymlift.report.contact_sheet import contact_sheet

    sheet = contact_sheet(shown_pictures(tables))
    write_bytes_atomically(out / SHEET, sheet)
    write_bytes_atomically(out / PAGE, prepare_page(report, sheet).encode())
    sha256s = {table.path.name: table.facts["sha256"] for table in tables}
    facts = {"plan": job.plan, "report": report.facts()}
    write_manifest(out, kind="shards", facts=facts, known=sha256s)
    return report


def finished(job: Job) -> PrepareReport | None:
    """The report of a preparation that is done; one with other settings is refused."""
    if not (job.out / MANIFEST).exists():
        return None
    manifest = read_manifest(job.out)
    refuse_others(job.out, manifest.facts["plan"], job.plan)
    shutil.rmtree(scratch(job.out), ignore_errors=True)
    return PrepareReport.from_facts(job.out, manifest.facts["report"])


def read_rejects(out: Path, layout: Layout) -> list[BadSample]:
    rejected = []
    for number in range(layout.num_shards):
        path = rejects_of(out, number)
        if path.is_file():
            for line in path.read_text(encoding="utf-8").splitlines():
                fault = json.loads(line)
                rejected.append(BadSample(fault["sample"], fault["reason"], fault["detail"]))
    return rejected


def count_buckets(tables: Sequence[Table]) -> dict[str, int]:
    counts = Counter[tuple[int, int]]()
    for table in tables:
        counts.update(map(tuple, table.sizes.tolist()))
    return {f"{width} x {height}": count for (width, height), count in counts.most_common()}


def count_bytes(tables: Sequence[Table]) -> dict[str, int]:
    counts = Counter[str]()
    for table in tables:
        for suffix, spans in table.spans.items():
            counts[suffix] += int(spans[:, 1].sum())
    return dict(sorted(counts.items()))


def shown_pictures(tables: Sequence[Table]) -> list[tuple[Tensor, str]]:
    """The first pictures, which are a random choice, with what the model is told of them."""
    reader, shown = Reader(), list[tuple[Tensor, str]]()
    for table in tables:
        for index in range(len(table)):
            if len(shown) == SHOWN:
                return shown
            record: Record = table.record(index)
            if record.image_suffix is None:
                continue
            captions = reader.captions(record, reader.facts(record))
            shown.append((reader.stored_image(record), captions[0]))
    return shown


def refuse_strangers(out: Path) -> None:
    """Everything in `out` ends up in its manifest, so nothing else may be there."""
    known = {MANIFEST, REJECTED, PAGE, SHEET}
    if not out.exists():
        return
    with writing(out):
        strange = [p.name for p in out.iterdir() if p.name not in known and not OURS.match(p.name)]
    if strange:
        raise CannotWrite(
            f"{out}: holds other files ({', '.join(sorted(strange)[:3])}); take an empty folder "
            "for prepare.out"
        )


def remove_ours(out: Path, share: Share) -> None:
    if share.of > 1:
        raise BadRecipe(
            f"--overwrite would remove what other tasks make: remove {out} and {scratch(out)} "
            "first, then start the tasks"
        )
    if not out.exists():
        return
    with writing(out):
        (out / MANIFEST).unlink(missing_ok=True)
        shutil.rmtree(scratch(out), ignore_errors=True)
        for path in out.iterdir():
            path.unlink()
