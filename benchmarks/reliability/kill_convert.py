"""Kill convert everywhere, twice at random, and flip a thousand bits; against a naive writer.

    python -m benchmarks.reliability.kill_convert        # needs gcc; some minutes

Writes benchmarks/results/kill_convert.json.
"""

import argparse
import json
import random
import shutil
import tempfile
from collections import Counter
from pathlib import Path
from typing import Any

from asymlift.stages.convert import convert
from asymlift.stages.verify import verify
from tests.reliability.fake_pipeline import fake_plan
from tests.reliability.injector import build, run_under

DRIVER = "tests.reliability.kill_convert"
RESULTS = Path(__file__).parents[1] / "results" / "kill_convert.json"


def flip_bits(folder: Path, flips: int) -> dict[str, Any]:
    """Random single-bit flips over all files of a lifted folder and a basis, byte by byte."""
    plan = fake_plan(folder)
    convert(plan)
    lifted = shutil.copytree(plan.output, folder / "copy")  # no links: the base must stay whole
    files = [plan.basis, *sorted(path for path in lifted.rglob("*") if path.is_file())]
    sizes = [path.stat().st_size for path in files]
    dice, missed = random.Random(0), Counter[str]()
    for _ in range(flips):
        (path,) = dice.choices(files, weights=sizes)
        good = path.read_bytes()
        bit = dice.randrange(8 * len(good))
        damaged = bytearray(good)
        damaged[bit // 8] ^= 1 << bit % 8
        path.write_bytes(damaged)
        if verify(plan.basis if path == plan.basis else lifted).ok:
            missed[path.name] += 1
        path.write_bytes(good)
    return {"flips": flips, "found": flips - missed.total(), "missed": dict(missed)}


def _summary(runs: list[dict[str, Any]]) -> dict[str, Any]:
    return {
        "disk full from write": f"1 to {len(runs)}",
        "exit codes": dict(Counter(str(run["exit"]) for run in runs)),
        "states": dict(Counter(run["state"] for run in runs)),
        "problems": [run["problem"] for run in runs if run["problem"]],
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--pairs", type=int, default=200, help="random double kills per target")
    parser.add_argument("--flips", type=int, default=1000)
    options = parser.parse_args()
    results: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as name:
        library = build(Path(name))
        for target in ("empty", "old"):
            for scenario, *rest in (
                ["everywhere"],
                ["naive"],
                ["twice", str(options.pairs)],
                ["fill", *(str(n) for n in range(1, 42))],
            ):
                found = json.loads(run_under(library, DRIVER, scenario, target, *rest))
                found = _summary(found) if scenario == "fill" else found
                results[f"{scenario}, {target} target"] = found
                print(f"{scenario}, {target} target: {found}", flush=True)
        results["bit flips"] = flip_bits(Path(name), options.flips)
        print(results["bit flips"])
    RESULTS.parent.mkdir(exist_ok=True)
    RESULTS.write_text(json.dumps(results, indent=2) + "\n")


if __name__ == "__main__":
    main()
