"""Is it whole? Every byte against its checksum, and every number for what it claims to be."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import torch

from asymlift.artifacts import lifted_folder, manifest
from asymlift.artifacts.basis_file import has_checksum, load_basis
from asymlift.artifacts.diffusers_folder import DiffusersFolder, pipeline_index
from asymlift.artifacts.files import human_bytes, plural, sha256_file
from asymlift.artifacts.safetensors_stream import DTYPES, read_header, read_tensor
from asymlift.data.ahead import read_ahead
from asymlift.data.catalog import cut_to, shards_in
from asymlift.data.reader import Reader
from asymlift.data.records import BadSample, Record
from asymlift.data.table import index_path, index_shard, load_table
from asymlift.errors import BadData
from asymlift.families.base import TRANSFORMER
from asymlift.runtime.log import progress

SHARDS = "shards"  # the kind of a manifest in a folder of them
WEIGHTS = "*.safetensors"
WORKERS = 4
RUN_PARTS = ("basis.safetensors", "lifted", "checkpoints/step-*")
NO_CHECKSUM = "it carries no checksum: changed numbers cannot be told from right ones"


@dataclass(frozen=True)
class Verdict:
    """What was found: no problems, and it is whole."""

    path: Path
    kind: str
    facts: list[str] = field(default_factory=list)  # what was checked, and what cannot be known
    problems: list[str] = field(default_factory=list)  # each names its file

    @property
    def ok(self) -> bool:
        return not self.problems


def verify(path: Path) -> Verdict:
    """Check a basis, a lifted model, a checkpoint, shards, or a run with several of these."""
    if path.is_file():
        by_suffix = {".safetensors": _verify_basis, ".tar": _verify_shard}
        if path.suffix in by_suffix:
            return by_suffix[path.suffix](path)
        raise BadData(f"{path}: neither a basis (.safetensors) nor a shard (.tar).")
    if not path.is_dir():
        raise BadData(f"{path}: there is no such file or folder.")
    if (path / manifest.NAME).is_file() or (path / lifted_folder.FACTS).is_file():
        return _verify_folder(path)
    parts = [part for pattern in RUN_PARTS for part in sorted(path.glob(pattern))]
    if parts:
        return _verify_run(path, parts)
    if shards_in(path):
        return _verify_shards(path)
    if pipeline_index(path):
        raise BadData(
            f"{path}: a diffusers folder without {manifest.NAME}, so there is nothing to verify "
            "it against. asymlift writes one beside everything that it makes."
        )
    if not any(path.iterdir()):
        raise BadData(f"{path}: the folder is empty.")
    raise BadData(
        f"{path}: nothing that asymlift made: no {manifest.NAME}, and no run with a basis, a "
        "lifted model or checkpoints."
    )


def _verify_basis(path: Path) -> Verdict:
    try:
        basis = load_basis(path)
    except BadData as error:
        return Verdict(path, "basis", problems=[str(error)])
    rows, rank = basis.A.shape
    facts = [f"rank {rank} of {rows}, patches of {basis.patch} pixels, s = {basis.s:.6g}"]
    if not has_checksum(path):
        facts += [NO_CHECKSUM, f"it does not say {', '.join(basis.unknown)}"]
    return Verdict(path, "basis", facts)


def _verify_shard(path: Path) -> Verdict:
    """The shard against its index, then every sample; without an index, what can be read."""
    index = index_path(path)
    table, facts, problems = load_table(path, index), list[str](), list[str]()
    if table is not None and "sha256" in table.facts:
        size = path.stat().st_size
        if size != table.facts["bytes"]:
            table = cut_to(table, size)
        elif sha256_file(path) != table.facts["sha256"]:
            problems.append(f"{path}: its bytes have changed (sha256 differs)")
    else:
        if table is None and index.exists():
            problems.append(f"{index}: damaged, so {path.name} was read without it")
        table = index_shard(path)
        facts.append(NO_CHECKSUM)
    reader, unreadable = Reader(), list[BadSample]()
    with progress(f"verify {path.name}", len(table)) as ticker:
        records = map(table.record, range(len(table)))
        for fault in read_ahead(lambda record: _fault_of(reader, record), records, WORKERS):
            unreadable += [fault] if fault else []
            ticker.tick()
    bad = [*table.faults, *unreadable]
    lost = f", {sum(fault.count for fault in bad)} lost" if bad else ""
    facts.insert(0, f"{len(table) - len(unreadable)} samples read{lost}")
    return Verdict(path, "shard", facts, problems + [str(fault) for fault in bad])


def _fault_of(reader: Reader, record: Record) -> BadSample | None:
    try:
        reader.read(record)
        for suffix in record.parts:  # also embeddings of other captions than the first
            reader.bytes_of(record, suffix)
    except BadSample as fault:
        return fault
    return None


def _verify_shards(folder: Path) -> Verdict:
    """Every shard of a folder that has no manifest."""
    verdicts = [_verify_shard(path) for path in shards_in(folder)]
    facts = [plural(len(verdicts), "shard")]
    facts += [f"{v.path.name}: {fact}" for v in verdicts for fact in v.facts]
    return Verdict(folder, "shards", facts, [text for v in verdicts for text in v.problems])


def _verify_folder(folder: Path) -> Verdict:
    problems = manifest.check_manifest(folder)
    try:
        described = manifest.read_manifest(folder)
    except BadData as error:
        return Verdict(folder, "folder", problems=[str(error)])
    size = human_bytes(sum(size for size, _ in described.files.values()))
    facts = [f"{len(described.files)} files, {size}"]
    if described.kind == lifted_folder.KIND:
        networks: tuple[str, ...] = (TRANSFORMER,)
        try:
            networks = lifted_folder.read_lifted(folder).networks
        except BadData as error:
            problems.append(str(error))
        for name in networks:
            problems += _trouble(partial(DiffusersFolder(folder).headers, name))
        weights = sorted(path for name in networks for path in (folder / name).glob(WEIGHTS))
    elif described.kind == SHARDS:
        weights = []  # indexes, which hold no weights
    else:
        weights = sorted(folder.rglob(WEIGHTS))
    for path in weights:
        problems += _not_finite(path, path.relative_to(folder).as_posix())
    return Verdict(folder, described.kind, facts, list(dict.fromkeys(problems)))


def _verify_run(folder: Path, parts: list[Path]) -> Verdict:
    verdicts = [verify(part) for part in parts]
    named = [(v, v.path.relative_to(folder).as_posix()) for v in verdicts]
    return Verdict(
        folder,
        "run",
        [f"{name}: {v.kind}, {fact}" for v, name in named for fact in v.facts],
        [f"{name}: {problem}" for v, name in named for problem in v.problems],
    )


def _trouble(check: Callable[[], object]) -> Iterator[str]:
    try:
        check()
    except BadData as error:
        yield str(error)


def _not_finite(path: Path, name: str) -> Iterator[str]:
    """Read every number of a file: a checksum does not know that a weight is NaN."""
    try:
        header = read_header(path)
        for tensor, info in header.tensors.items():
            if not DTYPES[info.dtype][1].is_floating_point:
                continue
            values = read_tensor(path, tensor, header)
            values = values.float() if info.dtype.startswith("F8") else values
            if not bool(torch.isfinite(values).all()):
                yield f"{name}: {tensor} holds NaN or infinity"
    except BadData as error:
        yield str(error)
