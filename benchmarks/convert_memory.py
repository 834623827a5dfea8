"""Memory and time of convert against `cp -r`, on a synthetic FLUX.2 transformer of 2.4 GiB.

    python -m benchmarks.convert_memory [--folder DIR] [--other-disk DIR]

Layouts: shards that are hard-linked where nothing changes; one single file, all of which has to be
written again; and shards on another file system (--other-disk), where nothing can be linked.
Medians of three, with the base in the page cache (warm) and not (cold). What convert adds to
`cp` is sha256: every byte of the output, and once more of the input where it is written again.
Writes benchmarks/results/convert_memory.json.
"""

import argparse
import hashlib
import json
import os
import resource
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch

from asymlift.artifacts.basis_file import Basis, save_basis
from asymlift.artifacts.diffusers_folder import DiffusersFolder
from asymlift.artifacts.safetensors_stream import SafetensorsWriter, TensorInfo, save_tensors
from asymlift.maths.basis import random_basis
from asymlift.maths.color import ColorCode

RESULTS = Path(__file__).parent / "results" / "convert_memory.json"
INNER, d, D, PATCH = 4096, 128, 768, 16  # of FLUX.2 klein 9B
BLOCKS, SHARDS, RUNS = 8, 5, 3
STEM = "diffusion_pytorch_model"

CHILD = r"""
import json, re, sys
from pathlib import Path
from asymlift.families import FAMILIES
from asymlift.stages.convert import ConvertPlan, convert
base, basis, output = map(Path, sys.argv[1:])
report = convert(ConvertPlan(base, basis, output, FAMILIES["flux2"], verify="maps"))
status = Path("/proc/self/status").read_text()
peak = int(re.search(r"VmHWM:\s+(\d+) kB", status)[1]) * 1024
print(json.dumps({"seconds": report.seconds, "peak": peak, "linked": report.linked}))
"""


def tensor_infos() -> dict[str, TensorInfo]:
    """Real names and shapes; fewer blocks."""
    infos = {"x_embedder.weight": TensorInfo("BF16", (INNER, d))}
    for block in range(BLOCKS):
        name = f"single_transformer_blocks.{block}.attn"
        infos[f"{name}.to_qkv_mlp_proj.weight"] = TensorInfo("BF16", (9 * INNER, INNER))
    return infos | {"proj_out.weight": TensorInfo("BF16", (d, INNER))}


def write_base(folder: Path, shards: int) -> None:
    def write_json(name: str, value: object) -> None:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(json.dumps(value, indent=2) + "\n")

    write_json(
        "model_index.json",
        {
            "_class_name": "Flux2KleinPipeline",
            "transformer": ["diffusers", "Flux2Transformer2DModel"],
            "vae": ["diffusers", "AutoencoderKLFlux2"],
        },
    )
    write_json("vae/config.json", {"block_out_channels": [1] * 4, "latent_channels": 32})
    save_tensors(folder / f"vae/{STEM}.safetensors", {"weight": torch.ones(2)})
    config = {"_class_name": "Flux2Transformer2DModel", "in_channels": d, "out_channels": None}
    write_json("transformer/config.json", config)
    infos, weight_map = tensor_infos(), dict[str, str]()
    names, dice = list(infos), torch.Generator().manual_seed(0)
    for shard in range(shards):
        file = f"{STEM}-{shard + 1:05d}-of-{shards:05d}.safetensors"
        file = file if shards > 1 else f"{STEM}.safetensors"
        first, end = (len(names) * n // shards for n in (shard, shard + 1))
        chosen = {name: infos[name] for name in names[first:end]}
        weight_map |= dict.fromkeys(chosen, file)
        with SafetensorsWriter(folder / "transformer" / file, chosen) as writer:
            for name, info in writer.tensors.items():
                writer.write(name, torch.randn(info.shape, generator=dice).bfloat16())
    if shards > 1:
        size = sum(info.num_bytes for info in infos.values())
        index = {"metadata": {"total_size": size}, "weight_map": weight_map}
        write_json(f"transformer/{STEM}.safetensors.index.json", index)


def write_basis(path: Path, base: Path) -> None:
    A = random_basis(D, d, torch.Generator().manual_seed(0)).float().contiguous()
    color = ColorCode("oklab", (0.56, 0.0, 0.01), 0.16)
    vae = DiffusersFolder(base).fingerprint("vae")
    save_basis(path, Basis(A, 0.7, PATCH, family="flux2", color=color, vae_fingerprint=vae))


def children_cpu() -> float:
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def drop_from_cache(folder: Path) -> None:
    os.sync()
    for path in folder.rglob("*.safetensors"):
        with path.open("rb") as file:
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def compare(base: Path, basis: Path, place: Path, *, cold: bool = False) -> dict[str, Any]:
    """Copy and convert in turn; what is left over does not count."""
    copies, synced, seconds, processes, peaks, linked = [], [], [], [], [], 0
    work: dict[str, list[float]] = {"cp": [], "convert": []}
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    for _ in range(RUNS):
        copied, lifted = place / "copied", place / "lifted"
        if cold:
            drop_from_cache(base)
        started, used = time.monotonic(), children_cpu()
        subprocess.run(["cp", "-r", base, copied], check=True)
        copies.append(time.monotonic() - started)
        work["cp"].append(children_cpu() - used)
        os.sync()
        synced.append(time.monotonic() - started)
        shutil.rmtree(copied)
        os.sync()
        if cold:
            drop_from_cache(base)
        started, used = time.monotonic(), children_cpu()
        command = [sys.executable, "-c", CHILD, str(base), str(basis), str(lifted)]
        child = subprocess.run(command, check=True, stdout=subprocess.PIPE, env=environment)
        processes.append(time.monotonic() - started)
        work["convert"].append(children_cpu() - used)
        found = json.loads(child.stdout)
        seconds.append(found["seconds"])
        peaks.append(found["peak"])
        linked = found["linked"]
        shutil.rmtree(lifted)
        os.sync()
    files = sorted((base / "transformer").glob("*.safetensors"))
    return {
        "transformer bytes": sum(path.stat().st_size for path in files),
        "largest shard bytes": max(path.stat().st_size for path in files),
        "largest tensor bytes": max(info.num_bytes for info in tensor_infos().values()),
        "linked files": linked,
        "peak RSS bytes": max(peaks),
        "cp seconds": statistics.median(copies),
        "cp and sync seconds": statistics.median(synced),
        "convert seconds": statistics.median(seconds),
        "convert seconds with imports": statistics.median(processes),
        "convert / cp": round(statistics.median(seconds) / statistics.median(copies), 3),
        "convert / cp and sync": round(statistics.median(seconds) / statistics.median(synced), 3),
        "cp CPU seconds": statistics.median(work["cp"]),
        "convert CPU seconds with imports": statistics.median(work["convert"]),
        "all cp seconds": copies,
        "all convert seconds": seconds,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--folder", type=Path, help="where to write 8 GiB for a while")
    parser.add_argument("--other-disk", type=Path, help="a folder on another file system")
    options = parser.parse_args()
    probe = bytes(1 << 28)
    started = time.monotonic()
    hashlib.sha256(probe)
    results: dict[str, Any] = {
        "sha256 bytes per second": len(probe) / (time.monotonic() - started),
        "cores": os.cpu_count(),
        "load before": os.getloadavg()[0],
        "torch": torch.__version__,
    }
    with tempfile.TemporaryDirectory(dir=options.folder) as name:
        place = Path(name)
        for layout, shards in ((f"{SHARDS} shards", SHARDS), ("one file", 1)):
            base, basis = place / "base", place / "basis.safetensors"
            write_base(base, shards)
            write_basis(basis, base)
            for cold in (False, True):
                key = f"{layout}, {'cold' if cold else 'warm'}"
                results[key] = compare(base, basis, place, cold=cold)
            if options.other_disk and shards > 1:
                with tempfile.TemporaryDirectory(dir=options.other_disk) as other:
                    key = f"{layout}, warm, another file system"
                    results[key] = compare(base, basis, Path(other))
            shutil.rmtree(base)
    RESULTS.parent.mkdir(exist_ok=True)
    RESULTS.write_text(json.dumps(results, indent=2) + "\n")
    print(json.dumps(results, indent=2))


if __name__ == "__main__":
    main()
