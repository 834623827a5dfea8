"""Secrets of every kind, all commands, and where in what they said and wrote one shows up."""

import json
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tests.reliability.attacks import Built, Command
from tests.reliability.jail import Cell, Warden

CANARY = "cAnArY5f1e9dC0ffee"
ENVIRONMENT = {
    name: f"{CANARY}-{name.lower()}"
    for name in (
        "HF_TOKEN",
        "HUGGING_FACE_HUB_TOKEN",
        "WANDB_API_KEY",
        "AWS_SECRET_ACCESS_KEY",
        "AWS_SESSION_TOKEN",
        "GITHUB_TOKEN",
        "DATABASE_PASSWORD",
    )
}
URLS = {
    "password": f"https://user:{CANARY}@localhost:1/{{000..001}}.tar",
    "signature": f"https://localhost:1/0.tar?X-Amz-Credential=x&X-Amz-Signature={CANARY}",
    "store": f"s3://{CANARY}@bucket/0.tar",
    "header": f'pipe:curl -s -H "Authorization: Bearer {CANARY}" http://localhost:1/0.tar',
    "account": f"pipe:curl -s -u user:{CANARY} http://localhost:1/0.tar",
    "variable": f"pipe:API_TOKEN={CANARY} false",
}
CRASH = """
raise RuntimeError("cannot connect to https://user:{canary}@host/?token={canary} with " + {key!r})
"""


@dataclass
class Found:
    """What was looked through, and where the canary was."""

    commands: int = 0
    num_bytes: int = 0
    leaks: list[str] = field(default_factory=list)
    exits: dict[str, int] = field(default_factory=dict)


def orders(cell: Cell, built: Built, kinds: list[str]) -> Iterator[tuple[str, Command]]:
    """(what is tried, a command)"""
    sound = built.write(cell, basis={"images": 8, "holdout": 4})
    yield "sound", ["fit-basis", sound]
    for command in (["inspect", cell.out / "run"], ["verify", cell.out / "run"], ["doctor"]):
        yield "sound", command
    yield "help", ["--help"]
    (cell.inputs / "crash.py").write_text(CRASH.format(canary=CANARY, key=ENVIRONMENT["HF_TOKEN"]))
    yield "crash", ["fit-basis", sound, "--set", "model.family=crash:FAMILY", "--overwrite"]
    yield "not there", ["convert", sound, "--set", f"model.base=https://u:{CANARY}@h/m"]
    yield "bad recipe", ["convert", sound, "--set", f"sample.steps=https://u:{CANARY}@h/m"]
    for kind in kinds:
        url = URLS[kind]
        data = {"train": url, "validation": url, "mode": "stream"}
        prepare = {"source": url, "out": str(cell.out / "shards")}
        path = cell.inputs / f"{kind}.yaml"
        path.write_text(json.dumps(built.values(cell, data=data, prepare=prepare)))
        built.run(cell, "lifted") if not (cell.out / "run/lifted").exists() else None
        for verb in ("prepare", "fit-basis", "convert", "finetune", "sample"):
            more = ["--prompt", "x", "--weights", "lifted"] if verb == "sample" else []
            yield kind, [verb, path, *more, "--dry-run"]
            yield kind, [verb, path, *more, "--dry-run", "--json"]
        yield kind, ["inspect", path]
        yield kind, ["inspect", path, "--json"]
        yield kind, ["fit-basis", path, "--overwrite"]
        yield kind, ["prepare", path, "--json"]
        yield kind, ["finetune", path, "--set", "finetune.steps=2", "-v"]
        yield kind, ["convert", sound, "--set", f"data.train={url}", "--dry-run"]


def search(cell: Cell, built: Built, kinds: list[str]) -> Found:
    """Run every command with all secrets around it, and look for them."""
    found = Found()
    with Warden(ENVIRONMENT) as warden:
        for kind, command in orders(cell, built, kinds):
            outcome = warden.run(cell, command)
            said = f"{kind}: {' '.join(str(word) for word in command[:1] + command[2:])}"
            found.commands += 1
            found.num_bytes += len(outcome.output)
            found.exits[said.replace(CANARY, "SECRET")] = outcome.exit
            if CANARY in outcome.output:
                found.leaks.append(f"{said}: output")
            # The words of a command that the recipe names are its writer's.
            if kind not in ("header", "account", "variable"):
                found.leaks += [f"{said}: {c}" for c in outcome.commands if CANARY in c]
            found.leaks += [f"{said}: {path}" for path in written(cell, found)]
    return found


def written(cell: Cell, found: Found) -> Iterator[Path]:
    for path in sorted(cell.out.rglob("*")):
        if path.is_file() and "lifted" not in path.parts:
            data = path.read_bytes()
            found.num_bytes += len(data)
            if CANARY.encode() in data:
                yield path.relative_to(cell.out)


def as_results(found: Found) -> dict[str, Any]:
    return {
        "commands": found.commands,
        "kinds of URL": len(URLS),
        "secrets in the environment": len(ENVIRONMENT),
        "bytes searched": found.num_bytes,
        "leaks": found.leaks,
        "exit codes": found.exits,
    }


if __name__ == "__main__":
    built = Built(Path(sys.argv[1]))
    print(json.dumps(as_results(search(Cell(Path(sys.argv[2])), built, list(URLS))), indent=2))
