"""What a preparation made, as numbers and as a page."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from asymlift.report.html import numbers, page, paragraph, picture, table

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
    already_done: bool = False

    @property
    def num_rejected(self) -> int:
        return sum(self.rejected.values())

    def facts(self) -> dict[str, Any]:
        """As JSON has it, without what belongs to one run."""
        return {name: value for name, value in asdict(self).items() if name not in LOCAL}

    @classmethod
    def from_facts(cls, out: Path, facts: Mapping[str, Any]) -> "PrepareReport":
        return cls(out, complete=True, already_done=True, **facts)


def prepare_page(report: PrepareReport, sheet: bytes) -> str:
    """One page: counts, sizes, what was left out and why, and what the model will see."""
    headline = numbers(
        [
            (f"{report.num_samples:,}", "samples", f"in {report.num_shards:,} shards"),
            (f"{report.num_rejected:,}", "left out", "see rejected.jsonl"),
            (f"{len(report.buckets):,}", "sizes", "a batch holds pictures of one"),
            (f"{report.num_bytes / 1e9:,.2f} GB", "on disk", per_sample(report)),
        ]
    )
    seen = "What the model will see", picture(sheet, "A random choice, with the first captions.")
    sections = [
        ("", headline),
        *([seen] if sheet else []),
        ("Sizes", table(shortened(report.buckets), ("width x height", "samples"))),
        ("Bytes", table(list(report.bytes_per_part.items()), ("part", "bytes"))),
        ("Left out", left_out(report)),
        ("Made with", table([(k, told(v)) for k, v in report.made.items()])),
    ]
    if report.class_names:
        names = ", ".join(f"{n} {name}" for n, name in enumerate(report.class_names[:MANY]))
        sections.append(("Classes", paragraph(f"{len(report.class_names)}: {names}")))
    return page("asymlift prepare", sections)


def per_sample(report: PrepareReport) -> str:
    return f"{report.num_bytes / max(report.num_samples, 1) / 1e3:,.1f} kB a sample"


def shortened(counts: Mapping[str, int]) -> list[tuple[str, int]]:
    rows = list(counts.items())
    rest = rows[MANY:]
    return rows[:MANY] + ([(f"{len(rest)} more", sum(n for _, n in rest))] if rest else [])


def left_out(report: PrepareReport) -> str:
    if not report.rejected:
        return paragraph("Nothing.")
    examples = "".join(paragraph(line) for line in report.rejected_samples[:MANY])
    return table(list(report.rejected.items()), ("reason", "samples")) + examples


def told(value: Any) -> str:
    """A setting in a few characters; a fingerprint by its beginning."""
    if isinstance(value, Mapping):
        return ", ".join(f"{name} {inner}" for name, inner in value.items())
    text = str(value)
    return f"{text[:19]}..." if text.startswith("sha256:") else text
