"""Kill finetune at random moments, 20 times per ZeRO stage, and run it again until it is done.

    python -m benchmarks.reliability.kill_finetune        # some minutes per stage

Writes benchmarks/results/kill_finetune.json: losses, weights, averages, optimizer and previews of
every run that was killed, compared byte by byte with a run that nobody disturbed.
"""

import argparse

from benchmarks.reliability.figures import measured, write

DRIVER = "tests.reliability.kill_finetune"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--kills", type=int, default=20, help="per stage")
    parser.add_argument("--steps", type=int, default=30, help="of the run that is killed")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--stages", type=int, nargs="+", default=[1, 2, 3])
    parser.add_argument("--seconds", type=int, default=3600, help="per stage; then no more kills")
    options = parser.parse_args()
    numbers = [str(n) for n in (options.kills, options.seed, options.steps, options.seconds)]
    found = {f"ZeRO {stage}": measured(DRIVER, str(stage), *numbers) for stage in options.stages}
    write("kill_finetune", found)


if __name__ == "__main__":
    main()
