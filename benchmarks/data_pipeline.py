"""The input pipeline against a bare decode loop, and against plain webdataset, on the same files.

    python -m benchmarks.data_pipeline [--pictures N] [--side PIXELS] [--samples N]

Rounds are interleaved, so that a busy machine slows all alike; the ratio of each round counts, and
the median of the ratios is reported. The bare loop opens, decodes and copies every file in as many
threads; webdataset reads, decodes and collates the same shards in as many worker processes. Then
the memory of the pipeline over 50,000 small samples. Writes benchmarks/results/data_pipeline.json.
"""

import argparse
import gc
import json
import os
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from asymlift.data.buckets import Fit
from asymlift.data.catalog import Catalog, indexed, open_catalog
from asymlift.data.feed import ExactFeed
from asymlift.data.order import Order, share_of
from asymlift.data.reader import Reader
from asymlift.data.records import Sample
from asymlift.data.writer import Packed, packed_facts, write_shard

RESULTS = Path(__file__).parent / "results" / "data_pipeline.json"
BATCH, ROUNDS, SHARDS = 32, 5, 4
EPOCHS = 8  # a run: long enough that starting, and reading ahead at its end, hardly count
WORKERS = (1, 2)


def photograph(side: int, draw: np.random.Generator) -> bytes:
    """A JPEG with the spectrum of a photograph: noise at every scale, the coarse the strongest."""
    image = np.zeros((side, side, 3), np.float32)
    cell = side
    while cell >= 1:
        cells = draw.normal(size=(-(-side // cell), -(-side // cell), 3)).astype(np.float32)
        image += np.kron(cells, np.ones((cell, cell, 1), np.float32))[:side, :side] * cell**0.5
        cell //= 2
    image = 128 + image * (40 / image.std())
    stream = BytesIO()
    Image.fromarray(image.clip(0, 255).astype(np.uint8)).save(stream, "JPEG", quality=92)
    return stream.getvalue()


def make_files(folder: Path, count: int, side: int) -> tuple[list[Path], list[Path]]:
    """(loose files, shards of the same bytes)."""
    draw = np.random.default_rng(0)
    files, shards = list[Path](), list[Path]()
    for number in range(count):
        path = folder / "loose" / f"{number:06d}.jpg"
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(photograph(side, draw))
        files.append(path)
    for shard in range(SHARDS):
        path = folder / f"{shard:06d}.tar"
        write_shard(
            path, (packed(file, side) for file in files[shard::SHARDS]), made={"side": side}
        )
        shards.append(path)
    return files, shards


def packed(file: Path, side: int) -> Packed:
    members = {
        ".jpg": file.read_bytes(),
        ".txt": f"picture {file.stem}".encode(),
        ".json": packed_facts({}, side, side),
    }
    return Packed(file.stem, members, side, side)


# ---- the three ---------------------------------------------------------------------------------


def bare(files: list[Path], workers: int) -> int:
    """What nobody can be faster than: read, decode, copy out."""

    def decode(path: Path) -> Any:
        with Image.open(BytesIO(path.read_bytes())) as picture:
            return np.array(picture.convert("RGB"))

    with ThreadPoolExecutor(workers) as pool:
        return sum(array.shape[0] > 0 for array in pool.map(decode, files * EPOCHS))


def pipeline(shards: list[Path], side: int, workers: int) -> int:
    catalog = Catalog([indexed(path) for path in shards], Fit((side,), 16))
    order = Order(catalog.targets, BATCH, seed=0)
    share, count = share_of(range(BATCH), 0, 1, BATCH), 0
    with ExactFeed(catalog, order, share, Reader(), workers=workers) as feed:
        for step in range(EPOCHS * order.steps_per_epoch):
            (samples,) = feed.step(step).micro_batches
            count += sum(sample is not None for sample in samples)
    return count


def plain_webdataset(shards: list[Path], workers: int) -> int:
    os.environ["WDS_SECURE"] = "1"
    import webdataset as wds

    def to_tensor(sample: tuple[Any, str]) -> tuple[torch.Tensor, str]:
        return torch.from_numpy(np.array(sample[0])).permute(2, 0, 1).contiguous(), sample[1]

    dataset = (
        wds.WebDataset([str(p) for p in shards] * EPOCHS, shardshuffle=False, empty_check=False)
        .shuffle(100)
        .decode("pil")
        .to_tuple("jpg", "txt")
        .map(to_tensor)
        .batched(BATCH)
    )
    loader = torch.utils.data.DataLoader(dataset, batch_size=None, num_workers=workers)
    return sum(len(images) for images, _ in loader)


def timed(action: Callable[[], int], expected: int) -> float:
    gc.collect()
    started = time.perf_counter()
    found = action()
    seconds = time.perf_counter() - started
    assert found == expected, f"{found} pictures of {expected}"
    return seconds


def throughput(folder: Path, count: int, side: int) -> list[dict[str, Any]]:
    files, shards = make_files(folder, count, side)
    rows, total = [], count * EPOCHS
    for workers in WORKERS:
        runs: dict[str, Callable[[], int]] = {
            "bare": lambda workers=workers: bare(files, workers),  # type: ignore[misc]
            "pipeline": lambda workers=workers: pipeline(shards, side, workers),  # type: ignore[misc]
            "webdataset": lambda workers=workers: plain_webdataset(shards, workers),  # type: ignore[misc]
        }
        seconds: dict[str, list[float]] = {name: [] for name in runs}
        for run in runs.values():
            timed(run, total)  # page cache, imports
        for _ in range(ROUNDS):
            for name, run in runs.items():
                seconds[name].append(timed(run, total))
        row: dict[str, Any] = {"workers": workers, "pictures": count, "side": side}
        for name, values in seconds.items():
            row[f"{name} pictures/s"] = round(total / statistics.median(values), 1)
        for other in ("bare", "webdataset"):
            ratios = [b / p for b, p in zip(seconds[other], seconds["pipeline"], strict=True)]
            row[f"pipeline / {other}"] = round(statistics.median(ratios), 3)
        print(row, flush=True)
        rows.append(row)
    return rows


# ---- memory ------------------------------------------------------------------------------------


def resident() -> float:
    """MB of this process."""
    fields = Path("/proc/self/statm").read_text().split()
    return int(fields[1]) * os.sysconf("SC_PAGE_SIZE") / 1e6


def small_samples(count: int) -> Iterator[Sample]:
    image = torch.zeros(3, 32, 32, dtype=torch.uint8)
    latent = torch.zeros(4, 4, 4)
    for number in range(count):
        image[0, 0, 0] = number % 256
        yield Sample(f"{number:06d}", image, f"caption {number}", latent=latent)


def memory(folder: Path, count: int) -> dict[str, Any]:
    """Resident memory after every tenth of a long epoch."""
    path = folder / "small.tar"
    write_shard(path, small_samples(count), made={})
    catalog = open_catalog(str(path), Fit((32,), 16))
    order = Order(catalog.targets, BATCH, seed=0)
    share, seen = share_of(range(BATCH), 0, 1, BATCH), list[float]()
    started = time.perf_counter()
    with ExactFeed(catalog, order, share, Reader(), workers=2) as feed:
        for step in range(order.steps_per_epoch):
            feed.step(step)
            if (step + 1) % (order.steps_per_epoch // 10) == 0:
                seen.append(round(resident(), 1))
    seconds = time.perf_counter() - started
    row = {
        "samples": count,
        "MB after each tenth": seen,
        "MB grown after the first tenth": round(seen[-1] - seen[0], 1),
        "samples/s": round(count / seconds),
    }
    print(row, flush=True)
    return row


def indexing(folder: Path, count: int) -> dict[str, Any]:
    """Opening a shard that somebody else made, once and again."""
    path = folder / "small.tar"
    (folder / "small.index.safetensors").unlink()
    first = timed(lambda: len(indexed(path)), count)
    again = timed(lambda: len(indexed(path)), count)
    row = {"samples": count, "seconds to index": round(first, 2), "to open again": round(again, 4)}
    print(row, flush=True)
    return row


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--pictures", type=int, default=384)
    parser.add_argument("--side", type=int, default=512)
    parser.add_argument("--samples", type=int, default=50_000)
    options = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        results = {
            "throughput": throughput(folder, options.pictures, options.side),
            "memory": memory(folder, options.samples),
            "indexing": indexing(folder, options.samples),
            "cores": os.cpu_count(),
        }
    RESULTS.write_text(json.dumps(results, indent=2) + "\n")


if __name__ == "__main__":
    main()
