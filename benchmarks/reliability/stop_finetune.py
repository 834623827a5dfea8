"""Ask finetune to stop, 8 times in a run at random moments, and through torchrun.

    python -m benchmarks.reliability.stop_finetune        # about three minutes

Writes benchmarks/results/stop_finetune.json.
"""

import argparse

from benchmarks.reliability.figures import measured, write

DRIVER = "tests.reliability.stop_finetune"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--times", type=int, default=8)
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--stage", type=int, default=2)
    options = parser.parse_args()
    numbers = [options.stage, options.times, options.seed, options.steps]
    found = {
        "one rank is asked": measured(DRIVER, "ask", *map(str, numbers)),
        "torchrun is asked": measured(DRIVER, "torchrun"),
    }
    write("stop_finetune", found)


if __name__ == "__main__":
    main()
