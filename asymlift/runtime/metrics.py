"""metrics.jsonl: a line of numbers per step, and before the first step one of step 0."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from asymlift.artifacts.files import follow_no_link, write_bytes_atomically, writing
from asymlift.artifacts.parsing import parse_json


class Metrics:
    """Appends lines; those after the step that a run resumes from are dropped first.

    Every line is one write, so that a kill costs at most the line that was being written.
    """

    name = "metrics.jsonl"

    def __init__(self, path: Path, resumed_step: int) -> None:
        with writing(path):
            path.parent.mkdir(parents=True, exist_ok=True)
            if path.exists():
                # A run from the start measures step 0 anew.
                kept = [line for line in read_metrics(path) if line["step"] <= resumed_step]
                text = "".join(json.dumps(line) + "\n" for line in kept if resumed_step)
                write_bytes_atomically(path, text.encode())
            self.file = open(path, "ab", buffering=0, opener=follow_no_link)  # noqa: SIM115
        self.torn = False  # the last line was not written to its end

    def numbers(self, step: int, values: Mapping[str, Any]) -> None:
        line = (json.dumps({"step": step, **values}) + "\n").encode()
        data = b"\n" + line if self.torn else line
        self.torn = True
        written = self.file.write(data)
        if written != len(data):
            raise OSError(f"{written} of {len(data)} bytes were written: is the disk full?")
        self.torn = False

    def picture(self, step: int, name: str, path: Path) -> None:
        """Pictures are files already."""

    def close(self) -> None:
        self.file.close()


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
