"""doctor: packages, against the lowest versions allowed and those that were tested."""

import contextlib
import importlib
import importlib.metadata
import io
import re
import sys
import warnings
from collections.abc import Callable, Iterator

from asymlift.stages.doctor.check import Check, brief

# The versions that the tests last passed with. The lowest allowed ones stand in pyproject.toml.
TESTED = {
    "python": "3.11.7",
    "torch": "2.13.0",
    "torchvision": "0.28.0",
    "diffusers": "0.42.1",
    "transformers": "5.23.0",
    "deepspeed": "0.19.8",
    "peft": "0.21.2",
    "lpips": "0.1.4",
    "webdataset": "1.0.2",
    "safetensors": "0.8.0",
    "numpy": "2.4.6",
    "pillow": "13.0.0",
    "pydantic": "2.14.3",
    "pyyaml": "6.0.3",
    "einops": "0.8.2",
    "jinja2": "3.1.6",
    "rich": "15.0.0",
    "typer": "0.29.1",
}
LOWEST_PYTHON = "3.11"
MODULES = {"pillow": "PIL", "pyyaml": "yaml"}  # where the name to import is another
PROBES = {  # a name from inside: some of these import nothing until they are asked for something
    "torchvision": "models",
    "diffusers": "DiffusionPipeline",
    "transformers": "PreTrainedModel",
    "lpips": "LPIPS",
    "peft": "LoraConfig",
    "webdataset": "TarWriter",
}

EXTRAS = {  # package -> the extra that brings it, and what asks for it
    "bitsandbytes": ("adamw8bit", "finetune.optimizer.kind: adamw_8bit"),
    "tensorboard": ("tensorboard", "finetune.trackers: [tensorboard]"),
    "wandb": ("wandb", "finetune.trackers: [wandb]"),
    "pyarrow": ("parquet", "tables in .parquet"),
    "ftfy": ("prompts", "prompts of Kandinsky 5 and PRX"),
}


def python() -> Iterator[Check]:
    found = ".".join(map(str, sys.version_info[:3]))
    yield versioned("python", found, LOWEST_PYTHON, f"{found}, {sys.executable}")


def of_package(name: str) -> Callable[[], Iterator[Check]]:
    return lambda: package(name)


def package(name: str) -> Iterator[Check]:
    """Installed, importable, and of a version that is allowed and, better, tested."""
    lowest = lowest_versions().get(name, "")
    try:
        found = importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        yield Check(name, "fail", "not installed", _tested(name), f"pip install '{name}>={lowest}'")
        return
    try:
        note = import_quietly(name)
    except (Exception, SystemExit) as error:
        yield Check(
            name,
            "fail",
            f"{found} does not import: {brief(error)}",
            _tested(name),
            f"reinstall it: pip install --force-reinstall '{name}=={TESTED[name]}'",
        )
        return
    yield versioned(name, found, lowest, f"{found}{note}")


def import_quietly(name: str) -> str:
    """Import a package and return what is worth saying about it."""
    chatter = io.StringIO()
    with (
        contextlib.redirect_stdout(chatter),
        contextlib.redirect_stderr(chatter),
        warnings.catch_warnings(),
    ):
        warnings.simplefilter("ignore")
        if name == "deepspeed":
            from asymlift.runtime.engine import import_deepspeed

            import_deepspeed()
            return ""
        if name in PROBES:
            from asymlift.runtime import third_party, torchvision_shim

            getattr(third_party.library(name), PROBES[name])
            if name == "torchvision" and torchvision_shim.declare_missing_schemas():
                return (
                    ", whose compiled operators are for another torch; asymlift declares the two "
                    "that its imports ask for (nms, qnms), and needs neither"
                )
            return ""
        importlib.import_module(MODULES.get(name, name))
        return ""


def versioned(name: str, version: str, lowest: str, found: str) -> Check:
    """Too old fails; another minor version than the tested one is worth a warning."""
    if _numbers(version) < _numbers(lowest):
        remedy = f"pip install -U '{name}>={lowest}'" if name != "python" else "install a newer one"
        return Check(name, "fail", found, f"{lowest} or newer", remedy)
    if _numbers(version)[:2] != _numbers(TESTED[name])[:2]:
        return Check(name, "warn", found, _tested(name), "if something breaks, try that version")
    return Check(name, "ok", found, _tested(name))


def lowest_versions() -> dict[str, str]:
    """What pyproject.toml asks for: {'torch': '2.8', ...}."""
    matches = (
        re.match(r"([\w-]+)>=([\d.]+)(?!.*extra)", line)
        for line in importlib.metadata.requires("asymlift") or []
    )
    return {match[1].lower(): match[2] for match in matches if match}


def _tested(name: str) -> str:
    return f"tested {TESTED[name]}"


def _numbers(version: str) -> tuple[int, ...]:
    """'2.13.0+cpu' -> (2, 13, 0)."""
    return tuple(int(part) for part in re.findall(r"\d+", version.partition("+")[0])[:3])


def extras() -> Iterator[Check]:
    """What only some recipes need; each is said once, where it is and what it is for."""
    there, missing = [], []
    for name, (extra, purpose) in EXTRAS.items():
        try:
            there.append(f"{name} {importlib.metadata.version(name)}")
        except importlib.metadata.PackageNotFoundError:
            missing.append(f"{name} (pip install 'asymlift[{extra}]', for {purpose})")
    found = "; ".join([*there, *(f"not installed: {text}" for text in missing)])
    yield Check("optional packages", "ok", found)
