"""metrics.jsonl: a line of numbers per step, and before the first step one of step 0."""

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from asymlift.artifacts.files import follow_no_link, write_bytes_atomically, writing
from asymlift.artifacts.parsing import json_text, parse_json


class Metrics:
    """Appends lines; those after the step that a run resumes from are dropped first.

    Every line is one write, so that a kill costs at most the line that was being written.
    """

    name = "metrics.jsonl"

    def __init__(self, path: Path, resumed_step: int) -> None:
        self.path, self.resumed_step = path, resumed_step
        with writing(path):
            path.parent.mkdir(parents=True, exist_ok=True)
            if path.exists():
                # A run from the start measures step 0 anew.
                kept = [line for line in read_metrics(path) if line["step"] <= resumed_step]
                write_lines(path, kept if resumed_step else [])
            self.file = open(path, "ab", buffering=0, opener=follow_no_link)  # noqa: SIM115
        self.torn = False  # the last line was not written to its end

    def numbers(self, step: int, values: Mapping[str, Any]) -> None:
        """The line of a step; what a stop left out of the step before it goes into that line."""
        if 0 < step == self.resumed_step:
            self.complete(values)
            return
        line = (json_text({"step": step, **values}) + "\n").encode()
        data = b"\n" + line if self.torn else line
        self.torn = True
        written = self.file.write(data)
        if written != len(data):
            raise OSError(f"{written} of {len(data)} bytes were written: is the disk full?")
        self.torn = False

    def complete(self, values: Mapping[str, Any]) -> None:
        lines = {line["step"]: line for line in read_metrics(self.path)}
        before = lines.get(self.resumed_step, {"step": self.resumed_step})
        lines[self.resumed_step] = {**before, **values}
        write_lines(self.path, lines.values())
        self.file.close()
        self.file = open(self.path, "ab", buffering=0, opener=follow_no_link)  # noqa: SIM115

    def picture(self, step: int, name: str, path: Path) -> None:
        """Pictures are files already."""

    def close(self) -> None:
        self.file.close()


def write_lines(path: Path, lines: Iterable[Mapping[str, Any]]) -> None:
    write_bytes_atomically(path, "".join(json_text(line) + "\n" for line in lines).encode())


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """All whole lines; what was cut by a kill or by a full disk is left out."""
    lines = []
    for text in path.read_text(encoding="utf-8", errors="replace").splitlines():
        try:
            line = parse_json(text)
        except ValueError:
            continue
        if isinstance(line, dict) and isinstance(line.get("step"), int):
            lines.append(line)
    return lines
