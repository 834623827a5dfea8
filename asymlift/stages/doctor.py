"""Is this machine fit: packages against tested versions, accelerator, memory, disk, launcher.

Nothing here raises: a package that is missing, or breaks when it is imported, is a line that says
so and what to do. For that reason nothing but the standard library is imported at the top.
"""

import contextlib
import importlib
import importlib.metadata
import io
import os
import re
import resource
import shutil
import sys
import time
import traceback
import warnings
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

Status = Literal["ok", "warn", "fail"]

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

GIB = 2**30
LOW_MEMORY, LOW_DISK, LOW_SHM = 8 * GIB, 20 * GIB, GIB
LOW_GPU_MEMORY = 24 * GIB  # a bfloat16 model of 9 B numbers is 17 GiB before it draws anything
LOW_OPEN_FILES = 1024  # 64 shards per rank, the files of a sharded model, sockets
STALE_LOCK = 600.0  # seconds; no operator takes that long to build

DRIVER = Path("/proc/driver/nvidia/version")
BACKBONES = ("vgg16-397923af.pth", "alexnet-owt-7be5be79.pth", "squeezenet1_1-b8a52dc0.pth")


@dataclass(frozen=True)
class Check:
    """One thing looked at. Only `fail` keeps asymlift from working."""

    name: str
    status: Status
    found: str
    needed: str = ""
    remedy: str = ""


def examine() -> list[Check]:
    """Look at everything, in the order in which one thing builds on another."""
    looks: list[tuple[str, Callable[[], Iterator[Check]]]] = [
        ("python", python),
        *((name, _of_package(name)) for name in TESTED if name != "python"),
        ("accelerator", accelerator),
        ("deepspeed accelerator", deepspeed_accelerator),
        ("compiled operators", compiled_operators),
        ("perceptual weights", perceptual_weights),
        ("memory", memory),
        ("disk", disk),
        ("shared memory", shared_memory),
        ("open files", open_files),
        ("launcher", launcher),
    ]
    return [check for name, look in looks for check in guarded(name, look)]


def is_fit(checks: list[Check]) -> bool:
    return all(check.status != "fail" for check in checks)


def as_json(checks: list[Check]) -> dict[str, Any]:
    return {"fit": is_fit(checks), "checks": [asdict(check) for check in checks]}


def render(checks: list[Check]) -> Any:
    """A rich table; what to do stands under what was found."""
    from rich.table import Table
    from rich.text import Text

    styles = {"ok": "green", "warn": "yellow", "fail": "bold red"}
    table = Table("", "what", "found", "tested or needed", box=None, pad_edge=False)
    for check in checks:
        found = Text(check.found)
        if check.remedy:
            found.append(f"\n-> {check.remedy}", style=styles[check.status])
        status = Text(check.status, style=styles[check.status])
        table.add_row(status, check.name, found, check.needed)
    return table


def guarded(name: str, look: Callable[[], Iterator[Check]]) -> list[Check]:
    """What a look found; what it raises, too, is something found."""
    found: list[Check] = []
    try:
        found.extend(look())
    except (Exception, SystemExit) as error:
        found.append(Check(name, "fail", _brief(error), remedy=f"reinstall what it names ({name})"))
    return found


# ---- packages ----------------------------------------------------------------------------------


def python() -> Iterator[Check]:
    found = ".".join(map(str, sys.version_info[:3]))
    yield versioned("python", found, LOWEST_PYTHON, f"{found}, {sys.executable}")


def _of_package(name: str) -> Callable[[], Iterator[Check]]:
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
            f"{found} does not import: {_brief(error)}",
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


def _brief(error: BaseException) -> str:
    """The first line, with the kind of error: one line says enough."""
    return traceback.format_exception_only(error)[-1].strip().splitlines()[0][:300]


# ---- what computes -----------------------------------------------------------------------------


def accelerator() -> Iterator[Check]:
    import torch

    built = f"torch {torch.__version__}"
    if not torch.cuda.is_available():
        driver = DRIVER.exists()
        if driver and torch.version.cuda is None:
            yield Check(
                "accelerator",
                "fail",
                f"an NVIDIA driver, but {built} is built for the CPU",
                "torch with CUDA",
                "install torch and torchvision for CUDA: pytorch.org/get-started",
            )
        elif driver:
            yield Check(
                "accelerator",
                "fail",
                f"an NVIDIA driver, but {built} (CUDA {torch.version.cuda}) sees no GPU; "
                f"CUDA_VISIBLE_DEVICES={os.environ.get('CUDA_VISIBLE_DEVICES')}",
                "",
                "compare nvidia-smi's CUDA version with torch's, and check CUDA_VISIBLE_DEVICES",
            )
        else:
            yield Check(
                "accelerator",
                "warn",
                f"none: {os.cpu_count()} CPU cores, of which torch uses {torch.get_num_threads()}",
                "",
                "enough for the demo, fit-basis and convert; finetuning a large model needs GPUs",
            )
        return
    for index in range(torch.cuda.device_count()):
        device = torch.cuda.get_device_properties(index)
        free, total = torch.cuda.mem_get_info(index)
        found = f"{device.name}, {_gib(total)}, {_gib(free)} free, CUDA {torch.version.cuda}"
        name = f"GPU {index}"
        if device.major < 8:
            yield Check(name, "warn", found, "bfloat16", "set finetune.precision: float32")
        elif free < 0.8 * total:
            yield Check(name, "warn", found, "", "another process holds memory: see nvidia-smi")
        elif total < LOW_GPU_MEMORY:
            yield Check(name, "warn", found, _gib(LOW_GPU_MEMORY), "too small for the large models")
        else:
            yield Check(name, "ok", found)


def deepspeed_accelerator() -> Iterator[Check]:
    import torch

    from asymlift.runtime.engine import import_deepspeed

    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        import_deepspeed()
        from deepspeed.accelerator import get_accelerator

        seen = str(get_accelerator()._name)
    expected = "cuda" if torch.cuda.is_available() else "cpu"
    name, asked = "deepspeed accelerator", os.environ.get("DS_ACCELERATOR")
    if seen == expected:
        yield Check(name, "ok", seen)
    else:
        said = f"{seen}, but torch computes on {expected} (DS_ACCELERATOR={asked})"
        yield Check(name, "fail", said, expected, "unset DS_ACCELERATOR")


def compiled_operators() -> Iterator[Check]:
    """asymlift uses no operator that DeepSpeed compiles; other settings may."""
    tools = [tool for tool in ("c++", "ninja", "nvcc") if shutil.which(tool)]
    found = f"compilers here: {', '.join(tools) or 'none'}; asymlift needs none of them"
    yield Check("compiled operators", "ok", found)
    for lock in sorted(extensions_folder().glob("**/lock")):
        age = time.time() - lock.stat().st_mtime
        if age > STALE_LOCK:
            yield Check(
                "compiled operators",
                "fail",
                f"{lock} is {age / 60:.0f} minutes old: a build that was killed",
                "no lock",
                f"rm {lock} (every start that builds this operator waits for it, silently)",
            )
        else:
            yield Check(
                "compiled operators",
                "warn",
                f"{lock}: a build is under way, or was killed just now",
                "",
                "look again in ten minutes",
            )


def extensions_folder() -> Path:
    """Where torch builds operators."""
    given = os.environ.get("TORCH_EXTENSIONS_DIR")
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    return Path(given) if given else cache / "torch_extensions"


def perceptual_weights() -> Iterator[Check]:
    import torch

    folder = Path(torch.hub.get_dir()) / "checkpoints"
    there = [name for name in BACKBONES if (folder / name).is_file()]
    if BACKBONES[0] in there:
        yield Check("perceptual weights", "ok", f"{', '.join(there)} in {folder}")
    else:
        yield Check(
            "perceptual weights",
            "warn",
            f"no {BACKBONES[0]} in {folder}",
            "for finetune.loss.perceptual",
            "put torchvision's file there or name it in the recipe; the demo brings its own",
        )


# ---- what it computes with ---------------------------------------------------------------------


def memory() -> Iterator[Check]:
    from asymlift.runtime.memory import container_limit

    total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    said = f"{_gib(total)} in this machine"
    limit = container_limit()
    if limit is not None and limit < total:
        total, said = limit, f"{_gib(limit)} for this container, {said}"
    yield _at_least("memory", total, LOW_MEMORY, said, "close other programs; use a smaller batch")


def disk() -> Iterator[Check]:
    here = Path.cwd()
    free = shutil.disk_usage(here).free
    remedy = "a lifted 9 B model takes 17 GiB beside its base, a checkpoint about 3: set `runs:`"
    yield _at_least("disk", free, LOW_DISK, f"{_gib(free)} free in {here}", remedy)


def shared_memory() -> Iterator[Check]:
    path = Path("/dev/shm")
    if not path.is_dir():
        return
    size = shutil.disk_usage(path).total
    remedy = "ranks on one machine talk through it: docker run --shm-size=16g"
    yield _at_least("shared memory", size, LOW_SHM, f"{_gib(size)} in {path}", remedy)


def open_files() -> Iterator[Check]:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    low = soft != resource.RLIM_INFINITY and soft < LOW_OPEN_FILES
    yield Check(
        "open files",
        "warn" if low else "ok",
        f"{soft} at once ({hard} allowed)",
        f"{LOW_OPEN_FILES}" if low else "",
        "ulimit -n 65536" if low else "",
    )


def launcher() -> Iterator[Check]:
    """Which ranks a stage would see if it started now."""
    given = {k: os.environ.get(k) for k in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR")}
    said = " ".join(f"{key}={value}" for key, value in given.items() if value is not None)
    tasks = os.environ.get("SLURM_NTASKS", "1")
    if given["WORLD_SIZE"] is None:
        if tasks.isdigit() and int(tasks) > 1 and "SLURM_STEP_ID" in os.environ:
            yield Check(
                "launcher",
                "warn",
                f"SLURM_NTASKS={tasks}, but no WORLD_SIZE: every task would work alone",
                "RANK, WORLD_SIZE",
                "start torchrun in one task per node: srun --ntasks-per-node=1 torchrun ...",
            )
        else:
            yield Check("launcher", "ok", "none: one process")
        return
    from asymlift.errors import UserError
    from asymlift.runtime.dist import discover

    try:
        ranks = discover()
    except UserError as error:
        yield Check("launcher", "fail", str(error), "", "start with torchrun, which sets them all")
        return
    if ranks.world > 1 and given["MASTER_ADDR"] is None:
        remedy = "start with torchrun, which sets it"
        yield Check("launcher", "fail", f"{said}, no MASTER_ADDR", "MASTER_ADDR", remedy)
    else:
        yield Check("launcher", "ok", f"rank {ranks.rank} of {ranks.world}: {said}")


def _at_least(name: str, amount: int, low: int, said: str, remedy: str) -> Check:
    if amount < low:
        return Check(name, "warn", said, f"better {_gib(low)}", remedy)
    return Check(name, "ok", said)


def _gib(amount: float) -> str:
    return f"{amount / GIB:.1f} GiB"
