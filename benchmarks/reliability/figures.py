"""What the figures of reliability share: run an experiment, show its progress, keep its result."""

import json
import os
import platform
import subprocess
import sys
import time
from importlib.metadata import version
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
RESULTS = ROOT / "benchmarks" / "results"
Found = dict[str, Any]


def measured(module: str, *words: str, library: Path | None = None) -> Any:
    """What `python -m module words` prints; its progress goes to the screen."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    if library is not None:
        environment["LD_PRELOAD"] = str(library)
    process = subprocess.run(
        [sys.executable, "-m", module, *words],
        env=environment,
        cwd=ROOT,
        stdout=subprocess.PIPE,
        text=True,
        check=True,
    )
    return json.loads(process.stdout)


def write(name: str, found: Found) -> None:
    """benchmarks/results/NAME.json, with what it was measured on."""
    RESULTS.mkdir(exist_ok=True)
    measured_on = {
        "date": time.strftime("%Y-%m-%d"),
        "cores": os.cpu_count(),
        "python": platform.python_version(),
        **{package: version(package) for package in ("torch", "deepspeed")},
    }
    text = json.dumps({"measured on": measured_on, **found}, indent=2) + "\n"
    (RESULTS / f"{name}.json").write_text(text)
    print(text)
