"""Measure fit-basis against the textbook: `python benchmarks/fit_basis.py [--images 128]`.

Both fit the same images, from the same shards, on one core, in the same run. The textbook goes
image by image with everything in float64. Times are CPU seconds, so that a busy machine counts
less. Writes benchmarks/results/fit_basis.json.

p 16 and d 128 (D 768), the sizes of FLUX.2. Pictures are rendered scenes; the latents are a noisy
linear map of the pixels, since no real autoencoder is needed to measure sums.
"""

import argparse
import json
import platform
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from io import BytesIO
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from asymlift.data.buckets import Fit
from asymlift.data.catalog import open_catalog
from asymlift.data.packing import pack
from asymlift.data.pairs import PairReader
from asymlift.data.pictures import encode_png, image_to_float, tensor_to_picture
from asymlift.data.reader import Reader
from asymlift.data.records import FACTS, LATENT, Record
from asymlift.data.writer import Packed, packed_facts, write_shard
from asymlift.embedded.scenes import make_scenes
from asymlift.families.base import Geometry
from asymlift.maths.basis import (
    alignment,
    norm_matched_scale,
    principal_angles,
    procrustes,
    random_basis,
)
from asymlift.maths.color import ColorCode
from asymlift.maths.moments import Moments, normalised
from asymlift.maths.patches import image_to_tokens, tokens_to_image
from asymlift.runtime import log
from asymlift.stages.basis_statistics import Statistics, cut

RESULTS = Path(__file__).parent / "results" / "fit_basis.json"
SIZES = Geometry(vae_factor=8, channels=32, patch=2)
COLOR = ColorCode("oklab", (0.56, 0.0, 0.01), 0.16)
JUDGES = 64


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--images", type=int, default=512, help="images to fit")
    parser.add_argument("--side", type=int, default=512, help="their height and width")
    parser.add_argument("--memory", type=Path, help=argparse.SUPPRESS)  # a shard, in a new process
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    log.set_verbosity(-1)
    if arguments.memory:
        return print_memory(arguments.memory, arguments.images)
    with tempfile.TemporaryDirectory() as folder:
        results = {
            "machine": {"cpu": cpu_name(), "cores_used": 1, "torch": torch.__version__},
            "images": arguments.images,
            "side": arguments.side,
            **{
                kind: measure(Path(folder), kind, arguments.images, arguments.side)
                for kind in ("jpeg", "png")
            },
            "peak_memory_mib": {
                str(number): memory_of(Path(folder) / "jpeg.tar", number)
                for number in (arguments.images // 8, arguments.images)
            },
        }
    RESULTS.parent.mkdir(exist_ok=True)
    RESULTS.write_text(json.dumps(results, indent=2) + "\n")
    print(json.dumps(results, indent=2))
    return None


def measure(folder: Path, kind: str, number: int, side: int) -> dict[str, Any]:
    shard = folder / f"{kind}.tar"
    make_shard(shard, kind, number + JUDGES, side)
    records = records_of(shard)
    fit, judge = records[:number], records[number:]
    judged = normalise(ours(folder, judge, None))

    def timed(make: Callable[[], Moments]) -> tuple[float, float, Tensor, float]:
        start, wall = time.process_time(), time.perf_counter()
        moments = normalise(make())
        A, _ = procrustes(moments)
        s = norm_matched_scale(A, moments)
        seconds = time.process_time() - start
        return seconds, time.perf_counter() - wall, A, alignment(A, s, judged).r2

    naive, naive_wall, A_naive, r2_naive = timed(lambda: textbook(fit))
    results: dict[str, Any] = {
        "textbook": {"ms_per_image": 1e3 * naive / number, "r2": r2_naive},
    }
    for images, per_image in [(number, None), (number, 64), (number // 4, 256), (number // 8, 384)]:
        seconds, wall, A, r2 = timed(lambda n=images, t=per_image: ours(folder, fit[:n], t))  # type: ignore[misc]
        name = "exact" if per_image is None else f"{images} images, {per_image} tokens each"
        results[name] = {
            "ms_per_image": 1e3 * seconds / images,
            "times_faster": naive / seconds,
            "times_faster_by_the_clock": naive_wall / wall,
            "largest_principal_angle": float(principal_angles(A, A_naive).max()),
            "r2": r2,
            "r2_difference": r2 - r2_naive,
        }
    return results


def textbook(records: list[Record]) -> Moments:
    reader, sums = Reader(), Moments.zero(SIZES.D, SIZES.d)
    raw = ColorCode(COLOR.space, (0.0, 0.0, 0.0), 1.0)
    for record in records:
        latent = reader.latent(record)
        assert latent is not None
        image = image_to_float(reader.image(record)).double()
        x = image_to_tokens(raw.encode(image[None]), SIZES.pixel_patch)[0]
        z = image_to_tokens(latent[None].double(), SIZES.patch)[0]
        sums.num_images += 1
        sums.num_tokens += len(x)
        sums.sum_x += x.sum(0)
        sums.sum_z += z.sum(0)
        sums.gram += x.T @ x
        sums.cross += z.T @ x
        sums.energy_z += (z * z).sum()
    return sums


def ours(folder: Path, records: list[Record], tokens_per_image: int | None) -> Moments:
    pairs = PairReader(COLOR.space, SIZES, tokens_per_image=tokens_per_image)
    chunks = cut("fit", records, smallest=8)
    with tempfile.TemporaryDirectory(dir=folder) as statistics:
        work = Statistics(Path(statistics), chunks, pairs, SIZES, max_bad_fraction=0.0)
        work.make(chunks, lambda: False)
        return work.total(chunks)[0]


def normalise(moments: Moments) -> Moments:
    return normalised(moments, COLOR.mean, COLOR.std, SIZES.pixel_patch)


def records_of(shard: Path) -> list[Record]:
    """In an order that depends on the keys alone, as fit-basis chooses them."""
    catalog = open_catalog(shard, Fit((SIZES.pixel_patch,), SIZES.pixel_patch))
    return catalog.lowest_hashes(len(catalog))


def make_shard(path: Path, kind: str, number: int, side: int) -> None:
    """Scenes with a little grain, and latents that keep a rotated low-frequency part of them."""
    draw = torch.Generator().manual_seed(0)
    low = random_basis(SIZES.D, SIZES.d, draw)
    first = scene(0, side, draw)
    x = image_to_tokens(COLOR.encode(image_to_float(first)[None].double()), SIZES.pixel_patch)[0]
    strong = torch.linalg.svd(x, full_matrices=False)[2][: SIZES.d].T
    A = torch.linalg.qr(strong + 0.1 * low)[0] @ random_basis(SIZES.d, SIZES.d, draw)
    grid = (side // SIZES.pixel_patch, side // SIZES.pixel_patch)

    suffix, encode = (".png", encode_png) if kind == "png" else (".jpg", encode_jpeg)

    def samples() -> Iterator[Packed]:
        for index in range(number):
            image = scene(index, side, draw)
            tokens = image_to_tokens(COLOR.encode(image_to_float(image)[None]), SIZES.pixel_patch)
            z = tokens @ A.float() / 3
            z += 0.3 * z.std() * torch.randn(z.shape, generator=draw)
            latent = tokens_to_image(z, SIZES.patch, grid)[0]
            members = {
                suffix: encode(image),
                FACTS: packed_facts({}, side, side),
                LATENT: pack({"latent": latent}, "float32"),
            }
            yield Packed(f"{index:06d}", members, side, side)

    write_shard(path, samples())


def scene(index: int, side: int, draw: torch.Generator) -> Tensor:
    image = make_scenes([index], seed=0, size=side).image[0]
    grain = 0.03 * torch.randn(image.shape, generator=draw)
    return ((image + grain).clamp(0, 1) * 255).round().to(torch.uint8)


def encode_jpeg(image: Tensor) -> bytes:
    """With colour at half the resolution, as cameras do."""
    stream = BytesIO()
    tensor_to_picture(image).save(stream, "JPEG", quality=92)
    return stream.getvalue()


def memory_of(shard: Path, number: int) -> float:
    command = [sys.executable, __file__, "--memory", str(shard), "--images", str(number)]
    return float(subprocess.run(command, check=True, capture_output=True, text=True).stdout)


def print_memory(shard: Path, number: int) -> None:
    """MiB by which the process grew at most; Linux only."""
    records = records_of(shard)
    ours(shard.parent, records[:1], None)  # what the first product and the first image set up
    Path("/proc/self/clear_refs").write_text("5")  # forget the peak so far
    before = peak_kib()
    ours(shard.parent, records[:number], None)
    print((peak_kib() - before) / 1024)


def peak_kib() -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return int(next(line.split()[1] for line in lines if line.startswith("VmHWM")))


def cpu_name() -> str:
    path = Path("/proc/cpuinfo")
    lines = path.read_text().splitlines() if path.exists() else []
    return next(
        (line.partition(": ")[2] for line in lines if "model name" in line), platform.machine()
    )


if __name__ == "__main__":
    main()
