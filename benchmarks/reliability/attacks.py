"""Every hostile input against every command that reads it.

    python -m benchmarks.reliability.attacks [WORDS OF A NAME]        # tens of minutes on two cores

No code of an input may run, nothing may be written outside of the output folder, no command may
take a GiB more than it began with, and each ends with a message and the right exit code. Nothing
here is random. Writes benchmarks/results/attacks.json.
"""

import argparse
import json
import shutil
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from tests.reliability import attack_data, attack_models, attacks
from tests.reliability.attacks import Attack, make_built, problems_of
from tests.reliability.jail import Cell, Warden

RESULTS = Path(__file__).parents[1] / "results" / "attacks.json"


def every_attack() -> Iterator[Attack]:
    yield from attacks.recipe_attacks()
    yield from attacks.prompt_attacks()
    yield from attacks.run_folder_attacks()
    yield from attack_data.shard_attacks()
    yield from attack_data.index_attacks()
    yield from attack_data.listing_attacks()
    yield from attack_models.base_attacks()
    yield from attack_models.basis_attacks()
    yield from attack_models.manifest_attacks()
    yield from attack_models.lifted_attacks()
    yield from attack_models.checkpoint_attacks()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("words", nargs="?", default="", help="only attacks with this in the name")
    options = parser.parse_args()
    started = time.monotonic()
    found: dict[str, Any] = {}
    exits, kinds, most, commands = Counter[str](), Counter[str](), 0, 0
    with tempfile.TemporaryDirectory() as name, Warden() as warden:
        built = make_built(Path(name) / "built", warden)
        for number, attack in enumerate(every_attack()):
            if options.words not in attack.name:
                continue
            kinds[attack.name.partition(",")[0]] += 1
            cell = Cell(Path(name) / str(number))
            for command, allowed in attack.prepare(cell, built):
                problems, outcome = problems_of(warden, cell, command, allowed)
                commands += 1
                exits[str(outcome.exit)] += 1
                most = max(most, outcome.grown)
                if problems:
                    found[f"{attack.name}: {command[0]}"] = problems
                    print(f"{attack.name}: {command[0]}: {problems}", flush=True)
            shutil.rmtree(cell.folder, ignore_errors=True)
    results = {
        "attacks": dict(kinds),
        "commands": commands,
        "exit codes": dict(exits),
        "most memory above the start, MiB": most >> 20,
        "problems": found,
        "seconds": round(time.monotonic() - started),
    }
    print(json.dumps(results, indent=2))
    if not options.words:
        RESULTS.write_text(json.dumps(results, indent=2) + "\n")


if __name__ == "__main__":
    main()
