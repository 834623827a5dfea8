"""Go on with finetune at every ZeRO stage and on every number of ranks, from every other.

    python -m benchmarks.reliability.resume_finetune      # about ten minutes; 4 processes at most

Writes benchmarks/results/resume_finetune.json.
"""

import argparse
from typing import Any

from benchmarks.reliability.figures import measured, write

DRIVER = "tests.reliability.resume_finetune"


def summary(pairs: list[dict[str, Any]]) -> dict[str, Any]:
    """Pairs on as many ranks as before, and on others."""

    def of(some: list[dict[str, Any]]) -> dict[str, Any]:
        return {
            "pairs": len(some),
            "equal, bit for bit": sum(pair["equal"] for pair in some),
            **{
                f"largest relative difference of {what}": max(
                    (pair[what] for pair in some), default=0
                )
                for what in ("loss", "norm", "weights")
            },
        }

    def ranks(name: str) -> str:
        return name.rsplit("-", 1)[1]

    same = [pair for pair in pairs if ranks(pair["from"]) == ranks(pair["to"])]
    return {
        "on as many ranks": of(same),
        "on another number": of([p for p in pairs if p not in same]),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--ranks", default="1,2,4")
    parser.add_argument("--stages", default="1,2,3")
    options = parser.parse_args()
    found: dict[str, Any] = {"ranks": options.ranks, "stages": options.stages}
    for kind in ("lora", "full"):
        found[kind] = summary(measured(DRIVER, kind, options.stages, options.ranks))
        print(found[kind], flush=True)
    for way in ("clipped", "accumulated"):
        some = measured(DRIVER, "lora", options.stages, "2", way)
        found[f"lora, {way}, on 2 ranks"] = {
            **summary(some)["on as many ranks"],
            "equal": [f"{pair['from']} to {pair['to']}" for pair in some if pair["equal"]],
        }
    write("resume_finetune", found)


if __name__ == "__main__":
    main()
