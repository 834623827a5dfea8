"""Secrets in the environment and in every kind of URL, all commands: where does one show up?

    python -m benchmarks.reliability.canaries        # minutes

Looked through are stdout, stderr, every file below the output folder and the command lines of the
processes that were started, except those that the recipe itself spells out (`pipe:COMMAND`).
Writes benchmarks/results/canaries.json.
"""

import json
import tempfile
from pathlib import Path

from tests.reliability.attacks import Built
from tests.reliability.canaries import URLS, as_results, search
from tests.reliability.jail import Cell
from tests.stages.small_run import build

RESULTS = Path(__file__).parents[1] / "results" / "canaries.json"


def main() -> None:
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        build(folder / "built")
        found = search(Cell(folder / "cell"), Built(folder / "built"), list(URLS))
    results = as_results(found)
    print(json.dumps(results, indent=2))
    RESULTS.write_text(json.dumps(results, indent=2) + "\n")


if __name__ == "__main__":
    main()
