"""What a run folder says of itself: the resolved recipe, versions, and what was run when."""

import json
import os
import platform
import shlex
import sys
import time
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
import yaml

from asymlift import __version__
from asymlift.artifacts.files import human_bytes, write_bytes_atomically, writing
from asymlift.artifacts.manifest import canonical_json, digest_json
from asymlift.artifacts.parsing import parse_json, read_small
from asymlift.errors import CannotWrite
from asymlift.recipe import Recipe
from asymlift.redact import redacted, redacted_values

LIBRARIES = ("torch", "diffusers", "transformers", "deepspeed", "peft", "lpips", "safetensors")
CONFIG, RUN = "config.yaml", "run.json"


def library_versions() -> dict[str, str]:
    """No host names, no paths, no environment."""
    found = {"asymlift": __version__, "python": platform.python_version()}
    for name in LIBRARIES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found


def hardware() -> dict[str, Any]:
    """What a run's speed depends on; nothing that names the machine."""
    return {
        "gpus": [torch.cuda.get_device_name(n) for n in range(torch.cuda.device_count())],
        "cpus": os.cpu_count(),
        "memory": human_bytes(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")),
        "system": f"{platform.system()} {platform.machine()}",
    }


def record(recipe: Recipe, command: str) -> None:
    """Write config.yaml, and add the command to run.json."""
    record_start(recipe, command)
    record_recipe(recipe)


def resolved(recipe: Recipe) -> dict[str, Any]:
    """The recipe with every default, as anybody may see it: without secrets."""
    values: dict[str, Any] = redacted_values(json.loads(recipe.model_dump_json()))
    return values


def record_recipe(recipe: Recipe) -> None:
    """Write config.yaml, without the secrets of the recipe."""
    text = yaml.safe_dump(resolved(recipe), sort_keys=False, default_flow_style=None, width=100)
    write_bytes_atomically(recipe.run_folder / CONFIG, text.encode())


def record_start(recipe: Recipe, command: str) -> None:
    """Add an entry to run.json, which has one for every time that something was started."""
    folder = recipe.run_folder
    with writing(folder):
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except FileNotFoundError:  # a file system that makes no folders
            raise CannotWrite(f"{folder}: cannot be made; choose another `runs` folder") from None
    line = shlex.join([Path(sys.argv[0]).name, *sys.argv[1:]])
    entry = {
        "command": command,
        "line": redacted(line),
        "at": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        "recipe": digest_json(resolved(recipe)),
        "versions": library_versions(),
        "hardware": hardware(),
    }
    write_commands(recipe, [*commands_in(folder), entry])


def add_to_start(recipe: Recipe, **facts: Any) -> None:
    """What is known only after the start: added to the last entry of run.json."""
    *before, last = commands_in(recipe.run_folder) or [{}]
    write_commands(recipe, [*before, {**last, **facts}])


def write_commands(recipe: Recipe, commands: list[dict[str, Any]]) -> None:
    body = {"name": recipe.name, "commands": commands}
    write_bytes_atomically(recipe.run_folder / RUN, canonical_json(body))


def commands_in(folder: Path) -> list[dict[str, Any]]:
    """What was run before; a damaged file is begun anew."""
    try:
        commands = parse_json(read_small(folder / RUN))["commands"]
    except (OSError, ValueError, KeyError, TypeError):
        return []
    return commands if isinstance(commands, list) else []
