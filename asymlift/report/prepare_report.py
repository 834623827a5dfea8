"""What a preparation made, as numbers and as a page."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from asymlift.data.records import CAPTION, FACTS, IMAGE_SUFFIXES, LATENT
from asymlift.report.html import items, numbers, page, paragraph, picture, table

MANY = 30  # rows of a table on the page
LOCAL = ("out", "complete", "num_made", "num_missing", "already_done")  # of one run, not of shards


@dataclass(frozen=True)
class PrepareReport:
    """What is in the folder, and what was left out; `complete` once all tasks are through."""

    out: Path
    complete: bool
    num_shards: int
    num_missing: int = 0
    num_made: int = 0  # by this task, now
    num_samples: int = 0
    num_bytes: int = 0
    buckets: dict[str, int] = field(default_factory=dict)  # "width x height" -> samples
    bytes_per_part: dict[str, int] = field(default_factory=dict)  # by suffix
    rejected: dict[str, int] = field(default_factory=dict)  # by reason
    rejected_samples: list[str] = field(default_factory=list)  # the first few
    made: dict[str, Any] = field(default_factory=dict)
    class_names: list[str] = field(default_factory=list)
    num_without_caption: int = 0  # of those that are trained with captions
    advice: str = ""  # what to change where many are too small
    already_done: bool = False

    @property
    def num_rejected(self) -> int:
        return sum(self.rejected.values())

    @property
    def without_caption(self) -> str:
        """A few words on samples without one, which easily goes unnoticed."""
        number = self.num_without_caption
        return f"{number} of {self.num_samples} have no caption: an empty prompt" if number else ""

    def facts(self) -> dict[str, Any]:
        """As JSON has it, without what belongs to one run."""
        return {name: value for name, value in asdict(self).items() if name not in LOCAL}

    @classmethod
    def from_facts(cls, out: Path, facts: Mapping[str, Any]) -> "PrepareReport":
        """JSON has them by name; here the most frequent come first."""
        counts = {name: most_first(facts[name]) for name in ("buckets", "rejected")}
        return cls(out, complete=True, already_done=True, **{**facts, **counts})


def most_first(counts: Mapping[str, int]) -> dict[str, int]:
    return dict(sorted(counts.items(), key=lambda item: -item[1]))


def prepare_page(report: PrepareReport, sheet: bytes) -> str:
    """One page: counts, sizes, what was left out and why, and what the model will see."""
    headline = numbers(
        [
            (
                f"{report.num_samples:,}",
                "samples",
                f"in {report.num_shards:,} shard{'s' * (report.num_shards != 1)}",
            ),
            (f"{report.num_rejected:,}", "left out", "each is named in rejected.jsonl"),
            (f"{len(report.buckets):,}", "sizes", "a batch holds pictures of one"),
            (weight(report.num_bytes), "on disk", f"{per_sample(report, report.num_bytes)} each"),
        ]
    )
    seen = "What the model will see", picture(sheet, "A random choice, with the first captions.")
    sections = [
        ("", headline),
        *([seen] if sheet else []),
        ("Left out", left_out(report)),
        *(
            [("Captions", paragraph(f"{report.without_caption}."))]
            if report.without_caption
            else []
        ),
        ("Sizes", sizes(report)),
        ("Bytes", parts(report)),
        ("Made with", table([(name, told(value)) for name, value in report.made.items()])),
    ]
    if report.class_names:
        names = ", ".join(f"{n} {name}" for n, name in enumerate(report.class_names[:MANY]))
        more = ", ..." if len(report.class_names) > MANY else ""
        sections.append(("Classes", paragraph(f"{len(report.class_names)}: {names}{more}")))
    return page("asymlift prepare", sections)


def sizes(report: PrepareReport) -> str:
    found = list(report.buckets.items())
    rest = found[MANY:]
    if rest:
        found = [*found[:MANY], (f"{len(rest)} more", sum(count for _, count in rest))]
    total = max(report.num_samples, 1)
    rows = [(size, count, f"{count / total:.1%}") for size, count in found]
    return table(rows, ("width x height", "samples", "share"))


def parts(report: PrepareReport) -> str:
    """Bytes by what they are for; a sample's several captions together."""
    named: dict[str, int] = {}
    for suffix, count in report.bytes_per_part.items():
        name = part_name(suffix)
        named[name] = named.get(name, 0) + count
    rows = [(name, weight(count), per_sample(report, count)) for name, count in named.items()]
    return table(sorted(rows), ("part", "in all", "a sample"))


def part_name(suffix: str) -> str:
    if suffix in IMAGE_SUFFIXES:
        return "image"
    if suffix.startswith(".text"):
        return "text embeddings"
    return {LATENT: "latent", CAPTION: "caption", FACTS: "facts"}.get(suffix, suffix)


def per_sample(report: PrepareReport, count: int) -> str:
    return f"{count / max(report.num_samples, 1) / 1e3:,.1f} kB"


def weight(count: int) -> str:
    """Decimal units, as disks are sold and as `shard_bytes` is given."""
    for unit, size in (("TB", 1e12), ("GB", 1e9), ("MB", 1e6)):
        if count >= size:
            return f"{count / size:,.2f} {unit}"
    return f"{count / 1e3:,.1f} kB"


def left_out(report: PrepareReport) -> str:
    if not report.rejected:
        return paragraph("Nothing.")
    counts = table(report.rejected.items(), ("reason", "samples"))
    advice = paragraph(report.advice) if report.advice else ""
    return counts + advice + items(report.rejected_samples[:MANY])


def told(value: Any) -> str:
    """A setting in a few characters; a fingerprint by its beginning."""
    if isinstance(value, Mapping):
        return ", ".join(f"{name} {inner}" for name, inner in value.items())
    text = str(value)
    return f"{text[:19]}..." if text.startswith("sha256:") else text
