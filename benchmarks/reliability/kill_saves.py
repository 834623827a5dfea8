"""Kill finetune at the file operations of its saves, and fill its disk at every write.

    python -m benchmarks.reliability.kill_saves           # needs gcc; about ten minutes

Writes benchmarks/results/kill_saves.json. Rank 0, which writes, dies at every other operation
of two saves and of the removals that belong to them; with two ranks at every twentieth, and rank 1
while rank 0 stands at one.
"""

import argparse
import tempfile
from collections import Counter
from pathlib import Path
from typing import Any

from benchmarks.reliability.figures import measured, write
from tests.reliability.injector import build

DRIVER = "tests.reliability.kill_saves"


def summary(runs: list[dict[str, Any]]) -> dict[str, Any]:
    return {
        "disk full from write": [run["write"] for run in runs],
        "exits": dict(Counter(str(run["exits"]) for run in runs)),
        "newest committed then": dict(Counter(f"step {run['newest committed']}" for run in runs)),
        "names path, bytes needed and free": sum(
            all(words in run["message"] for words in ("/checkpoints", "needs", "free"))
            for run in runs
        ),
        "problems": [problem for run in runs for problem in run["problems"]],
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--every", type=int, default=2, help="operations between kills")
    parser.add_argument("--pairs", type=int, default=10, help="double kills")
    parser.add_argument("--writes", type=int, nargs="+", default=list(range(1, 31, 3)))
    options = parser.parse_args()
    every, wide = options.every, 10 * options.every
    writes = ":".join(str(write) for write in options.writes)
    alone = [f"kill:0:{every}:1", f"twice:{options.pairs}:0", f"fill:{writes}", "once:1:7:13:19"]
    two = [f"kill:0:{wide}:1", f"kill:1:{wide}:{wide // 2 + 1}"]
    with tempfile.TemporaryDirectory() as name:
        library = build(Path(name))
        killed, twice, full, once = measured(DRIVER, "1", "2", *alone, library=library)
        first, second = measured(DRIVER, "2", "3", *two, library=library)
    found = {
        "one rank, killed": killed,
        "one rank, killed twice": twice,
        "two ranks, rank 0 killed": first,
        "two ranks, rank 1 killed": second,
        "disk full": summary(full),
        "one save fails": summary(once),
    }
    write("kill_saves", found)


if __name__ == "__main__":
    main()
