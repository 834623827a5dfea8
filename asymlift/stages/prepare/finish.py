"""The end of a preparation, and what its folder may hold: shards, lists, pages, the manifest."""

import json
import re
import shutil
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

from torch import Tensor

from asymlift.artifacts.files import write_bytes_atomically, writing
from asymlift.artifacts.manifest import NAME as MANIFEST
from asymlift.artifacts.manifest import Manifest, read_manifest, write_manifest
from asymlift.data.reader import Reader
from asymlift.data.records import CAPTION, BadSample
from asymlift.data.table import Table, index_path, load_table
from asymlift.errors import BadData, CannotWrite
from asymlift.report.contact_sheet import contact_sheet
from asymlift.report.prepare_report import PrepareReport, prepare_page
from asymlift.stages.prepare.job import Job, count_reasons
from asymlift.stages.prepare.work import Layout, class_names, plan_path, refuse_others, scratch

SHOWN = 64  # pictures on the contact sheet, and rejects in the report
REJECTED, PAGE, SHEET = "rejected.jsonl", "prepare-report.html", "contact-sheet.png"
KIND = "shards"
SHARD = r"\d{6,}\.(tar|index\.safetensors)"
WHOLE = rf"{SHARD}|{'|'.join(map(re.escape, (MANIFEST, REJECTED, PAGE, SHEET)))}"
# What a process that was killed may leave: a shard, its index, or one of the others half written.
HALF = rf"\.{SHARD}(\.\w+)?(\.part)?|(?:{WHOLE})\.part"


def whole(path: Path, made: object) -> Table | None:
    """The index of a shard that was written to its end, for this purpose."""
    table = load_table(path, index_path(path))
    if table is None or not path.is_file() or "sha256" not in table.facts or table.made != made:
        return None
    return table if table.facts["bytes"] == path.stat().st_size else None


def is_whole(job: Job, layout: Layout, number: int) -> bool:
    return whole(layout.path(job.out, number), job.made) is not None


# ---- finishing ---------------------------------------------------------------------------------


def finish(job: Job, layout: Layout, num_made: int) -> PrepareReport:
    """The lists, the pictures for people, and at last the manifest, which makes all of it whole."""
    out = job.out
    for path in list(out.iterdir()):
        if re.fullmatch(HALF, path.name):
            path.unlink(missing_ok=True)
    paths = [layout.path(out, number) for number in range(layout.num_shards)]
    tables = [table for path in paths if (table := whole(path, job.made))]
    rejected = [*job.work.faults, *read_rejects(out, layout)]
    if not any(len(table) for table in tables):
        raise job.nothing_usable(rejected)
    write_bytes_atomically(out / REJECTED, lines_of(rejected))
    shown = shown_pictures(tables)
    report = PrepareReport(
        out=out,
        complete=True,
        num_shards=len(tables),
        num_made=num_made,
        num_samples=sum(len(table) for table in tables),
        num_bytes=sum(table.facts["bytes"] for table in tables),
        buckets=count_buckets(tables),
        bytes_per_part=count_bytes(tables),
        rejected=count_reasons(rejected),
        rejected_samples=[str(fault) for fault in rejected[:SHOWN]],
        made=job.made,
        class_names=class_names(job.work),
        num_without_caption=count_uncaptioned(job, tables),
        advice=job.advice(rejected, sum(map(len, tables))),
    )
    sheet = b""
    if shown:
        sheet = contact_sheet(shown)
        write_bytes_atomically(out / SHEET, sheet)
    write_bytes_atomically(out / PAGE, prepare_page(report, sheet).encode())
    sha256s = {table.path.name: table.facts["sha256"] for table in tables}
    facts = {"plan": job.plan, "report": report.facts()}
    write_manifest(out, kind=KIND, facts=facts, known=sha256s)
    return report


def finished(job: Job) -> PrepareReport | None:
    """The report of a preparation that is done; one with other settings is refused."""
    if not (job.out / MANIFEST).exists():
        return None
    manifest = read_manifest(job.out)
    refuse_others(job.out, manifest.facts["plan"], job.plan)
    refuse_incomplete(job.out, manifest)
    shutil.rmtree(scratch(job.out), ignore_errors=True)
    return PrepareReport.from_facts(job.out, manifest.facts["report"])


def refuse_incomplete(out: Path, manifest: Manifest) -> None:
    for name, (size, _) in manifest.files.items():
        path = out / name
        if not path.is_file() or path.stat().st_size != size:
            said = f"{path.stat().st_size} bytes, not {size}" if path.is_file() else "missing"
            raise BadData(f"{path}: {said}, though it was finished; --overwrite begins anew")


# ---- what was left out -------------------------------------------------------------------------


def rejects_of(out: Path, number: int) -> Path:
    return scratch(out) / f"rejected-{number:06d}.jsonl"


def lines_of(rejected: Sequence[BadSample]) -> bytes:
    """One line for each; `count` where it stands for several samples."""
    lines = []
    for fault in rejected:
        line = {"sample": fault.where, "reason": fault.reason, "detail": fault.detail}
        lines.append(json.dumps(line | ({"count": fault.count} if fault.count > 1 else {})))
    return "".join(f"{line}\n" for line in lines).encode()


def read_rejects(out: Path, layout: Layout) -> list[BadSample]:
    rejected = []
    for number in range(layout.num_shards):
        path = rejects_of(out, number)
        if path.is_file():
            for line in path.read_text(encoding="utf-8").splitlines():
                fault = json.loads(line)
                rejected.append(BadSample(fault["sample"], fault["reason"], fault["detail"]))
    return rejected


# ---- what is there -----------------------------------------------------------------------------


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


def count_uncaptioned(job: Job, tables: Sequence[Table]) -> int:
    """How many will be trained with an empty prompt, as far as these shards tell."""
    if job.settings.image == "none" or job.recipe.data.caption.source != "caption":
        return 0
    return sum(len(table) - int(table.has(CAPTION).sum()) for table in tables)


def shown_pictures(tables: Sequence[Table]) -> list[tuple[Tensor, str]]:
    """The first pictures, which are a random choice, with what the model is told of them."""
    reader, shown = Reader(), list[tuple[Tensor, str]]()
    for table in tables:
        for index in range(len(table)):
            record = table.record(index)
            if len(shown) == SHOWN or record.image_suffix is None:
                return shown
            captions = reader.captions(record, reader.facts(record))
            shown.append((reader.stored_image(record), captions[0]))
    return shown


# ---- the folder --------------------------------------------------------------------------------


def refuse_strangers(out: Path) -> None:
    """Everything in `out` ends up in its manifest, so nothing else may be there."""
    if not out.exists():
        return
    with writing(out):
        names = sorted(path.name for path in out.iterdir())
    if began_here(out):
        names = [name for name in names if not re.fullmatch(f"{WHOLE}|{HALF}", name)]
    if names:
        raise CannotWrite(
            f"{out}: holds other files ({', '.join(names[:3])}); take an empty folder for "
            "prepare.out"
        )


def began_here(out: Path) -> bool:
    """Whether the shards in `out` are of a preparation: finished, or on its way."""
    if plan_path(out).exists():
        return True
    return (out / MANIFEST).exists() and read_manifest(out).kind == KIND


def remove_ours(out: Path) -> None:
    """The manifest last: until then it says whose files these are."""
    with writing(out):
        if out.exists():
            for path in list(out.iterdir()):
                if path.name != MANIFEST:
                    path.unlink(missing_ok=True)
            (out / MANIFEST).unlink(missing_ok=True)
        if scratch(out).exists():
            shutil.rmtree(scratch(out))
