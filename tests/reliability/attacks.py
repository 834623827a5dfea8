"""Hostile inputs: what an attack is, what it starts from, and those by recipe, run folder and text.

Each one writes its input into a cell and gives the commands that read it, with the exit codes that
are right. A payload that runs makes the sentinel; a path that leads out meets the victims.
"""

import json
import os
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from asymlift.errors import Exit
from tests.reliability.jail import VICTIM, Cell, Outcome, Warden
from tests.stages.small_run import build, recipe_values

BAD_DATA, BAD_RECIPE, DONE = Exit.BAD_DATA, Exit.BAD_RECIPE, Exit.DONE
UNAVAILABLE, CANNOT_WRITE = Exit.UNAVAILABLE, Exit.CANNOT_WRITE
MOST_MEMORY = 1 << 30
SPARSE = 8 << 30  # bytes of a file that is a hole
DEEP = 200_000  # brackets inside one another
LOOK = (BAD_DATA, DONE)  # of inspect, which may name a problem and go on

Command = list[Any]
Orders = list[tuple[Command, tuple[int, ...]]]  # commands, and how they may end


@dataclass(frozen=True)
class Attack:
    name: str
    prepare: Callable[[Cell, "Built"], Orders]


@dataclass(frozen=True)
class Built:
    """What is sound, to be copied and spoilt: shards, base, basis, lifted model, checkpoint."""

    folder: Path

    @property
    def recipe(self) -> Path:
        return self.folder / "recipe.yaml"

    @property
    def step(self) -> Path:
        return self.folder / "run/checkpoints/step-000001"

    def values(self, cell: Cell, **sections: Any) -> dict[str, Any]:
        """A recipe that reads what is sound, and writes into the cell."""
        values = recipe_values(self.folder) | {"runs": str(cell.out)}
        for name, section in sections.items():
            old = values.get(name)
            values[name] = old | section if isinstance(old, dict) else section
        return values

    def write(self, cell: Cell, **sections: Any) -> Path:
        path = cell.inputs / "recipe.yaml"
        path.write_text(json.dumps(self.values(cell, **sections)))  # YAML, without aliases
        return path

    def run(self, cell: Cell, *parts: str) -> Path:
        """A run folder in the cell with copies of some parts; returns it."""
        for part in parts:
            source, target = self.folder / "run" / part, cell.out / "run" / part
            target.parent.mkdir(parents=True, exist_ok=True)
            if source.is_dir():
                shutil.copytree(source, target)
            else:
                shutil.copy(source, target)
        return cell.out / "run"


def make_built(folder: Path, warden: Warden, *, trained: bool = True) -> Built:
    """Some seconds; more with a checkpoint."""
    recipe = build(folder)
    if not trained:
        return Built(folder)
    cell = Cell(folder / "cell")
    lora = "finetune.train={lora: {rank: 2, alpha: 2}}"
    more = ["--set", lora, "--set", "finetune.loss.reference=shared"]
    done = warden.run(cell, ["finetune", recipe, "--set", "finetune.steps=1", *more])
    assert done.exit == 0, done.output
    return Built(folder)


def problems_of(
    warden: Warden, cell: Cell, command: Command, exits: tuple[int, ...]
) -> tuple[list[str], Outcome]:
    """Run one command in a cell: what should not have happened, in words."""
    before = cell.outside()
    outcome = warden.run(cell, command)
    found = []
    if cell.sentinel.exists():
        found.append("code of the input ran")
        cell.sentinel.unlink()
    changed = sorted(dict(set(before.items()) ^ set(cell.outside().items())))
    if changed or (cell.victims / "file").read_bytes() != VICTIM:
        found.append(f"written outside of the output: {', '.join(changed) or 'a victim'}")
    if outcome.grown > MOST_MEMORY:
        found.append(f"{outcome.grown >> 20} MiB of memory")
    if outcome.exit == -9:
        found.append("no end in sight")
    elif outcome.exit not in exits:
        found.append(f"exit {outcome.exit}, not {' or '.join(str(int(e)) for e in exits)}")
    if "Traceback" in outcome.output:
        found.append(outcome.output.splitlines()[-1])
    return found, outcome


def small_setting(*settings: str) -> list[str]:
    return [word for setting in settings for word in ("--set", setting)]


def sparse(path: Path, size: int = SPARSE) -> Path:
    with path.open("wb") as file:
        file.truncate(size)
    return path


# ---- recipes -----------------------------------------------------------------------------------


def recipe_attacks() -> Iterator[Attack]:
    def text(words: Callable[[Cell], str]) -> Callable[[Cell, Built], Orders]:
        def prepare(cell: Cell, built: Built) -> Orders:
            path = cell.inputs / "recipe.yaml"
            path.write_text(words(cell))
            commands = [["fit-basis", path, "--dry-run"], ["inspect", path]]
            return [(command, (BAD_RECIPE,)) for command in commands]

        return prepare

    bomb = "a0: &a0 [x, x]\n" + "".join(
        f"a{n}: &a{n} [*a{n - 1}, *a{n - 1}]\n" for n in range(1, 40)
    )
    texts: dict[str, Callable[[Cell], str]] = {
        "tag that calls": lambda c: f"name: !!python/object/apply:os.system ['{c.command}']\n",
        "tag that imports": lambda c: "name: !!python/name:antigravity.x\n",
        "aliases that double": lambda c: bomb,
        "deeply nested flow": lambda c: "name: " + "[" * DEEP,
        "deeply nested blocks": lambda c: "- " * DEEP,
        "number of many digits": lambda c: "name: " + "9" * 100_000,
        "name that leads out": lambda c: "name: ../../victims\n",
        "name that is a path": lambda c: f"name: {c.victims}\n",
        "keys twice": lambda c: "name: a\nname: b\n",
        "bytes": lambda c: "name: \0\x1b]0;x\x07\n",
    }
    for name, words in texts.items():
        yield Attack(f"recipe, {name}", text(words))

    def special(make: Callable[[Cell], object]) -> Callable[[Cell, Built], Orders]:
        def prepare(cell: Cell, built: Built) -> Orders:
            return [(["convert", make(cell), "--dry-run"], (BAD_RECIPE,))]

        return prepare

    yield Attack("recipe, a device", special(lambda cell: "/dev/zero"))
    yield Attack("recipe, a hole", special(lambda cell: sparse(cell.inputs / "r.yaml")))

    def override(cell: Cell, built: Built) -> Orders:
        path = built.write(cell)
        tag = f"name=!!python/object/apply:os.system ['{cell.command}']"
        return [(["fit-basis", path, "--set", tag], (BAD_RECIPE,))]

    yield Attack("recipe, tag in an override", override)

    def braces(cell: Cell, built: Built) -> Orders:
        path = built.write(cell, data={"train": "a{0..99999999}{0..99999999}.tar"})
        return [(["fit-basis", path], (BAD_DATA, BAD_RECIPE))]

    yield Attack("recipe, braces without end", braces)

    for place in ("train", "cache", "source"):

        def pipe(cell: Cell, built: Built, place: str = place) -> Orders:
            url = f"pipe:{cell.command}; cat {built.folder}/shards/000000.tar"
            if place == "source":
                path = built.write(cell, prepare={"source": url, "out": str(cell.out / "shards")})
                return [(["prepare", path], (BAD_DATA,))]
            path = built.write(cell, data={place: url})
            built.run(cell, "lifted")
            return [(["fit-basis", path], (BAD_DATA,)), (["finetune", path], (BAD_DATA,))]

        yield Attack(f"recipe, a command as {place} in exact mode", pipe)


# ---- prompts -----------------------------------------------------------------------------------


def prompt_attacks() -> Iterator[Attack]:
    def fifo(cell: Cell) -> Path:
        os.mkfifo(cell.inputs / "prompts")
        return cell.inputs / "prompts"

    def not_text(cell: Cell) -> Path:
        path = cell.inputs / "prompts"
        path.write_bytes(b"\xff\xfe\x00")
        return path

    files: dict[str, Callable[[Cell], object]] = {
        "a device": lambda cell: "/dev/zero",
        "a hole": lambda cell: sparse(cell.inputs / "prompts"),
        "a pipe": fifo,
        "not text": not_text,
        "a folder": lambda cell: cell.inputs,
    }
    for name, make in files.items():

        def prepare(cell: Cell, built: Built, make: Callable[[Cell], object] = make) -> Orders:
            path, given = built.write(cell), make(cell)
            built.run(cell, "lifted")
            preview = f"finetune.preview={{prompts: '{given}'}}"
            return [
                (["sample", path, "--weights", "lifted", "--prompts", given], (BAD_RECIPE,)),
                (["finetune", path, "--dry-run", "--set", preview], (BAD_RECIPE,)),
            ]

        yield Attack(f"prompts, {name}", prepare)

    def paths(cell: Cell, built: Built) -> Orders:
        path = built.write(cell, sample={"steps": 1})
        built.run(cell, "lifted")
        prompts = ["../../../victims/file", "/etc/passwd\n\0x", "<script>alert(1)</script>"]
        words = [word for prompt in prompts for word in ("--prompt", prompt)]
        return [(["sample", path, "--weights", "lifted", *words], (DONE,))]

    yield Attack("prompts, paths and markup", paths)


# ---- what lies in a run folder -------------------------------------------------------------------


LINKS = {  # what a command meets in a run folder -> the commands
    "half-written files": (
        ("config.yaml.part", "run.json.part", "basis.safetensors.part", "basis-report.html.part"),
        "fit-basis",
    ),
    "finished files": (("config.yaml", "run.json", "basis.safetensors"), "fit-basis"),
    "a lock": ((".finetune.lock",), "finetune"),
    "logs": (("metrics.jsonl", "logs/rank-0.log", "logs/skipped-0.jsonl"), "finetune"),
    "a half-written checkpoint": (("checkpoints/.writing-9-00000000",), "finetune"),
    "a checkpoint": (("checkpoints/step-000001",), "finetune"),
}


def run_folder_attacks() -> Iterator[Attack]:
    """Links that somebody left where a command writes, to what is there and to what is not."""
    for name, (places, command) in LINKS.items():
        for target in ("file", "new"):

            def prepare(
                cell: Cell,
                built: Built,
                places: tuple[str, ...] = places,
                command: str = command,
                target: str = target,
            ) -> Orders:
                path = built.write(cell, basis={"images": 8, "holdout": 4})
                run = built.run(cell, *(["lifted"] if command == "finetune" else []))
                for place in places:
                    (run / place).parent.mkdir(parents=True, exist_ok=True)
                    folder = place.startswith("checkpoints") and target == "file"
                    (run / place).symlink_to(cell.victims / ("" if folder else target))
                once = small_setting("finetune.steps=1", "finetune.checkpoint.keep=1")
                sets = once if command == "finetune" else []
                any_end = (DONE, CANNOT_WRITE, BAD_DATA)
                return [([command, path, *sets], any_end)]

            yield Attack(f"run folder, {name} linked to a {target}", prepare)

    def deep(cell: Cell, built: Built) -> Orders:
        run = built.run(cell, "basis.safetensors")
        for name in ("metrics.jsonl", "run.json", "config.yaml"):
            (run / name).write_text("[" * DEEP)
        (run / "samples/a").mkdir(parents=True)
        (run / "samples/a/index.json").write_text("[" * DEEP)
        path = built.write(cell)
        return [
            (["inspect", run], LOOK),
            (["inspect", run / "samples/a"], LOOK),
            (["verify", run], LOOK),
            (["convert", path, "--verify", "maps"], (DONE,)),
        ]

    yield Attack("run folder, deeply nested JSON", deep)
