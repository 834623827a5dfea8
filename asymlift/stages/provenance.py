"""What a run folder says of itself: the resolved recipe, versions, and what was run when."""

import json
import time
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import yaml

from asymlift import __version__
from asymlift.artifacts.files import write_bytes_atomically, writing
from asymlift.artifacts.manifest import canonical_json, digest_json
from asymlift.errors import CannotWrite
from asymlift.recipe import Recipe
from asymlift.redact import redacted_values

LIBRARIES = ("torch", "diffusers", "transformers", "deepspeed", "peft", "lpips", "safetensors")
CONFIG, RUN = "config.yaml", "run.json"


def library_versions() -> dict[str, str]:
    """No host names, no paths, no environment."""
    found = {"asymlift": __version__}
    for name in LIBRARIES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found


def record(recipe: Recipe, command: str) -> None:
    """Write config.yaml, without the secrets of the recipe, and add the command to run.json."""
    folder = recipe.run_folder
    with writing(folder):
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except FileNotFoundError:  # a file system that makes no folders
            raise CannotWrite(f"{folder}: cannot be made; choose another `runs` folder") from None
    resolved = redacted_values(json.loads(recipe.model_dump_json()))
    text = yaml.safe_dump(resolved, sort_keys=False, default_flow_style=None, width=100)
    write_bytes_atomically(folder / CONFIG, text.encode())
    entry = {
        "command": command,
        "at": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        "recipe": digest_json(resolved),
        "versions": library_versions(),
    }
    body = {"name": recipe.name, "commands": [*commands_in(folder), entry]}
    write_bytes_atomically(folder / RUN, canonical_json(body))


def commands_in(folder: Path) -> list[dict[str, Any]]:
    """What was run before; a damaged file is begun anew."""
    try:
        commands = json.loads((folder / RUN).read_bytes())["commands"]
    except (OSError, ValueError, KeyError, TypeError):
        return []
    return commands if isinstance(commands, list) else []
