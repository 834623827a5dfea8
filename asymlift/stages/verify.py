"""Is it whole? Every byte against its checksum, and every number for what it claims to be."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import torch

from asymlift.artifacts import lifted_folder, manifest
from asymlift.artifacts.basis_file import has_checksum, load_basis
from asymlift.artifacts.diffusers_folder import DiffusersFolder
from asymlift.artifacts.files import human_bytes
from asymlift.artifacts.safetensors_stream import DTYPES, read_header, read_tensor
from asymlift.errors import BadData

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
    """Check a basis, a lifted model, a checkpoint, a shard, or a run with several of these."""
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
    if (path / "model_index.json").is_file():
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
    from asymlift.data.shards import ShardReader, index_shard  # needs torchvision

    faults: list[BadData] = []
    try:
        index = index_shard(path, on_bad=faults.append)
    except BadData as error:
        return Verdict(path, "shard", problems=[str(error)])
    reader = ShardReader()
    for sample in index.samples:
        try:
            reader.read(sample)
        except BadData as error:
            faults.append(error)
    facts = [f"{len(index.samples)} samples read", NO_CHECKSUM]
    return Verdict(path, "shard", facts, [str(fault) for fault in faults])


def _verify_folder(folder: Path) -> Verdict:
    problems = manifest.check_manifest(folder)
    try:
        described = manifest.read_manifest(folder)
    except BadData as error:
        return Verdict(folder, "folder", problems=[str(error)])
    size = human_bytes(sum(size for size, _ in described.files.values()))
    facts = [f"{len(described.files)} files, {size}"]
    if described.kind == lifted_folder.KIND:
        problems += _trouble(lambda: lifted_folder.read_lifted(folder))
        problems += _trouble(lambda: DiffusersFolder(folder).headers("transformer"))
        weights = sorted((folder / "transformer").glob("*.safetensors"))
    else:
        weights = sorted(folder.rglob("*.safetensors"))
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
