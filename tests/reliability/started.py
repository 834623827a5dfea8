"""A module of these tests, run as a process of its own."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]


def told_by(module: str, *words: str) -> Any:
    """The JSON that it prints."""
    process = subprocess.run(
        [sys.executable, "-m", f"tests.reliability.{module}", *words],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    assert process.returncode == 0, process.stderr[-3000:]
    return json.loads(process.stdout)
