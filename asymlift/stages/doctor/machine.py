"""doctor: what computes, and what it computes with."""

import contextlib
import io
import os
import resource
import shutil
import time
from collections.abc import Iterator
from pathlib import Path

from asymlift.stages.doctor.check import GIB, Check, at_least, gib

LOW_MEMORY, LOW_DISK, LOW_SHM = 8 * GIB, 20 * GIB, GIB
LOW_GPU_MEMORY = 24 * GIB  # a bfloat16 model of 9 B numbers is 17 GiB before it draws anything
LOW_OPEN_FILES = 1024  # 64 shards per rank, the files of a sharded model, sockets
STALE_LOCK = 600.0  # seconds; no operator takes that long to build

DRIVER = Path("/proc/driver/nvidia/version")


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
        found = f"{device.name}, {gib(total)}, {gib(free)} free, CUDA {torch.version.cuda}"
        name = f"GPU {index}"
        if device.major < 8:
            yield Check(name, "warn", found, "bfloat16", "set finetune.precision: float32")
        elif free < 0.8 * total:
            yield Check(name, "warn", found, "", "another process holds memory: see nvidia-smi")
        elif total < LOW_GPU_MEMORY:
            yield Check(name, "warn", found, gib(LOW_GPU_MEMORY), "too small for the large models")
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


def collectives() -> Iterator[Check]:
    """What ranks talk through: NCCL between GPUs, gloo between CPUs."""
    import torch
    import torch.distributed as td

    if not td.is_available():
        yield Check("collectives", "fail", "torch without torch.distributed", "", "another torch")
    elif not torch.cuda.is_available():
        yield Check("collectives", "ok", "gloo")
    elif td.is_nccl_available():
        version = ".".join(map(str, torch.cuda.nccl.version()))  # type: ignore[no-untyped-call]
        yield Check("collectives", "ok", f"NCCL {version}")
    else:
        remedy = "install a torch with NCCL: several GPUs cannot train without"
        yield Check("collectives", "fail", "GPUs, but this torch has no NCCL", "NCCL", remedy)


def compiled_operators() -> Iterator[Check]:
    """Only offload to the host is faster with an operator that DeepSpeed compiles."""
    tools = [tool for tool in ("c++", "ninja", "nvcc") if shutil.which(tool)]
    found = (
        f"compilers here: {', '.join(tools) or 'none'}; zero.offload on GPUs and finetune.compile "
        "use one, nothing else does"
    )
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


def memory() -> Iterator[Check]:
    from asymlift.runtime.memory import container_limit

    total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    said = f"{gib(total)} in this machine"
    limit = container_limit()
    if limit is not None and limit < total:
        total, said = limit, f"{gib(limit)} for this container, {said}"
    yield at_least("memory", total, LOW_MEMORY, said, "close other programs; use a smaller batch")


def disk() -> Iterator[Check]:
    here = Path.cwd()
    free = shutil.disk_usage(here).free
    remedy = "a lifted 9 B model takes 17 GiB beside its base, a checkpoint about 3: set `runs:`"
    yield at_least("disk", free, LOW_DISK, f"{gib(free)} free in {here}", remedy)


def shared_memory() -> Iterator[Check]:
    path = Path("/dev/shm")
    if not path.is_dir():
        return
    size = shutil.disk_usage(path).total
    remedy = "ranks on one machine talk through it: docker run --shm-size=16g"
    yield at_least("shared memory", size, LOW_SHM, f"{gib(size)} in {path}", remedy)


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
    from asymlift.errors import UserError
    from asymlift.runtime.dist import discover

    try:
        ranks = discover()
    except UserError as error:
        remedy = "start with torchrun, which sets all that is needed"
        yield Check("launcher", "fail", str(error), "", remedy)
        return
    alone = ranks.world == 1
    yield Check(
        "launcher", "ok", "none: one process" if alone else f"rank {ranks.rank} of {ranks.world}"
    )
