"""Bad samples of a finetune: named once, counted by reason, and too many end the run."""

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from asymlift.artifacts.parsing import parse_json
from asymlift.data.catalog import Catalog
from asymlift.data.records import BadSample
from asymlift.errors import BadData
from asymlift.runtime import dist
from asymlift.runtime.dist import Ranks
from asymlift.runtime.log import Notes, warn
from asymlift.stages.basis_statistics import check_budget

MIN_SEEN = 1000  # before that many samples, the share of bad ones says little
NAMED = 3  # faults that are named on the screen, per reason; all of them go to logs/


@dataclass(frozen=True)
class Skipped:
    """A line of logs/skipped-RANK.jsonl."""

    sample: str
    reason: str
    detail: str
    count: int = 1  # samples that are lost with it

    def __str__(self) -> str:
        detail = f" ({self.detail})" if self.detail else ""
        return f"{self.sample}: {self.reason}{detail}"


def skipped(fault: BadSample) -> Skipped:
    return Skipped(fault.where, fault.reason, fault.detail, fault.count)


class Ledger:
    """What could not be trained on, on all ranks. Every rank has to call every method."""

    def __init__(self, folder: Path, ranks: Ranks, max_fraction: float) -> None:
        self.folder, self.ranks, self.max_fraction = folder / "logs", ranks, max_fraction
        self.notes = Notes(self.folder / f"skipped-{ranks.rank}.jsonl", warn)
        self.num_seen, self.num_bad = 0, 0  # while reading: over all epochs and ranks
        self.num_listed = self.num_lost = 0  # by the catalog, if there is one
        self.found = set[str]()  # samples that this process and its fellows could not use
        before = dist.first_does(ranks, lambda: read_skipped(folder))
        self.lines = dict.fromkeys(before)  # in order, as a set is not
        self.names = {line.sample for line in before}
        self.told = Counter[str]()

    @property
    def reasons(self) -> dict[str, int]:
        """Reason -> samples that are lost by it."""
        return by_reason(self.lines)

    def open(self, catalog: Catalog) -> None:
        """Take in what was wrong before the first sample was read."""
        lines = [skipped(fault) for fault in catalog.faults]
        new = [line for line in dict.fromkeys(lines) if line not in self.lines]
        if self.ranks.first:
            self.write(new)
        self.remember(new)
        self.num_listed, self.num_lost = catalog.num_listed, catalog.num_lost
        check_budget(catalog.faults, catalog.num_listed, self.max_fraction)

    def note(self, faults: Sequence[BadSample], num_good: int, num_bad: int) -> None:
        """Take in one step: what this rank could not use, and the counts of all ranks."""
        self.num_seen += num_good + num_bad
        self.num_bad += num_bad
        if num_bad == 0:
            return
        mine = [skipped(fault) for fault in faults]
        self.write(self.unnamed(mine))
        everywhere = [line for lines in dist.gathered(self.ranks, mine) for line in lines]
        self.found |= {line.sample for line in everywhere}
        new = self.unnamed(everywhere)
        self.remember(new)
        if self.ranks.first:
            self.tell(new)
        self.check()

    def check(self) -> None:
        """End the run where too many are bad: of those that were read, or of all that there are."""
        lost = self.num_lost + len(self.found)
        if self.num_bad > self.max_fraction * max(self.num_seen, MIN_SEEN):
            share = f"{self.num_bad} of {self.num_seen}"
        elif self.num_listed and lost > self.max_fraction * self.num_listed:
            share = f"{lost} of all {self.num_listed}"
        else:
            return
        some = "; ".join(map(str, list(self.lines)[-NAMED:]))
        counts = ", ".join(f"{reason} {count}" for reason, count in self.reasons.items())
        raise BadData(
            f"{share} samples are bad, more than data.max_bad_fraction {self.max_fraction:g} "
            f"allows: {some}\nall of them are listed in {self.folder}: {counts}"
        )

    def unnamed(self, lines: Sequence[Skipped]) -> list[Skipped]:
        """Those of samples that no line names yet, each once."""
        return list({line.sample: line for line in lines if line.sample not in self.names}.values())

    def write(self, lines: Sequence[Skipped]) -> None:
        if lines:
            self.notes.add(map(asdict, lines))

    def remember(self, lines: Sequence[Skipped]) -> None:
        self.lines |= dict.fromkeys(lines)
        self.names |= {line.sample for line in lines}

    def tell(self, lines: Sequence[Skipped]) -> None:
        for line in lines:
            self.told[line.reason] += 1
            if self.told[line.reason] <= NAMED:
                warn(f"{line}; left out")


def by_reason(lines: Iterable[Skipped]) -> dict[str, int]:
    counts = Counter[str]()
    for line in lines:
        counts[line.reason] += line.count
    return dict(counts.most_common())


def read_skipped(folder: Path) -> list[Skipped]:
    """What earlier runs in this folder wrote down; a line cut by a kill is left out."""
    lines = []
    for path in sorted((folder / "logs").glob("skipped-*.jsonl")):
        if not path.is_file():
            continue
        for text in path.read_text("utf-8", "replace").splitlines():
            try:
                lines.append(Skipped(**parse_json(text)))
            except (ValueError, TypeError):
                continue
    return lines
