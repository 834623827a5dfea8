"""Go on with finetune at every ZeRO stage and on every number of ranks, from every other.

    python -m benchmarks.reliability.resume_finetune      # about ten minutes; 4 processes at most

Writes benchmarks/results/resume_finetune.json: pairs of the same stage and ranks, of another stage,
and of another number of ranks.
"""

import argparse
from typing import Any

from benchmarks.reliability.figures import measured, write

DRIVER = "tests.reliability.resume_finetune"


def place(name: str) -> tuple[str, str]:
    """'lora-3-2' -> stage 3, 2 ranks."""
    _, stage, ranks = name.split("-")
    return stage, ranks


def summary(pairs: list[dict[str, Any]]) -> dict[str, Any]:
    """The pairs in three kinds, by what changes between the halves."""
    kinds: dict[str, list[dict[str, Any]]] = {
        "same stage, same ranks": [],
        "another stage, same ranks": [],
        "another number of ranks": [],
    }
    for pair in pairs:
        old, new = place(pair["from"]), place(pair["to"])
        same = "same stage" if old[0] == new[0] else "another stage"
        change = f"{same}, same ranks" if old[1] == new[1] else "another number of ranks"
        kinds[change].append(pair)
    return {change: figures(some) for change, some in kinds.items() if some}


def figures(some: list[dict[str, Any]]) -> dict[str, Any]:
    ranks = {f"{place(pair['from'])[1]} to {place(pair['to'])[1]}" for pair in some}
    return {
        "pairs": len(some),
        "ranks": sorted(ranks),
        "equal, bit for bit": sum(pair["equal"] for pair in some),
        **{
            f"largest relative difference of {what}": max(pair[what] for pair in some)
            for what in ("loss", "norm", "weights")
        },
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--ranks", default="1,2,4")
    parser.add_argument("--stages", default="1,2,3")
    options = parser.parse_args()
    found = {}
    for kind in ("lora", "full"):
        found[kind] = summary(measured(DRIVER, kind, options.stages, options.ranks))
        print(found[kind], flush=True)
    for way in ("clipped", "accumulated"):
        found[f"lora, {way}"] = summary(measured(DRIVER, "lora", options.stages, "2", way))
    write("resume_finetune", found)


if __name__ == "__main__":
    main()
