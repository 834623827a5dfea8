"""Flip a thousand single bits in everything that asymlift keeps, and let `verify` look.

    python -m benchmarks.reliability.flip_bits        # seconds to minutes; seed 0

Writes benchmarks/results/flip_bits.json.
"""

import argparse
import json
import tempfile
import time
from pathlib import Path

from tests.reliability.bit_flips import flip_everywhere, make_artifacts

RESULTS = Path(__file__).parents[1] / "results" / "flip_bits.json"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--flips", type=int, default=1000)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    started = time.monotonic()
    with tempfile.TemporaryDirectory() as name:
        found = flip_everywhere(make_artifacts(Path(name)), options.flips, options.seed)
    found |= {"seed": options.seed, "seconds": round(time.monotonic() - started, 1)}
    print(json.dumps(found, indent=2))
    RESULTS.write_text(json.dumps(found, indent=2) + "\n")


if __name__ == "__main__":
    main()
