"""Samples -> shards: WebDataset tars with their index, whole or absent, always the same bytes."""

import json
import os
import zlib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from asymlift.artifacts.files import fsync_folder, sha256_file, writing
from asymlift.data.packing import Dtype, pack
from asymlift.data.pictures import encode_png
from asymlift.data.records import CAPTION, FACTS, LATENT, TEXT, BadSample, Sample
from asymlift.data.table import (
    Row,
    Table,
    fault_in_name,
    index_path,
    members_of,
    save_table,
    table_of,
)
from asymlift.data.tar import shown


@dataclass(frozen=True)
class Packed:
    """A sample as the contents of files."""

    key: str
    members: Mapping[str, bytes]  # by suffix
    width: int  # of its image; 0 where there is none
    height: int


def write_shard(
    path: Path, samples: Iterable[Packed | Sample], *, made: Mapping[str, Any] | None = None
) -> Table:
    """Write samples, and the index last: a shard with a matching index is whole.

    `made` says what latents, embeddings and sizes come from.
    """
    os.environ["WDS_SECURE"] = "1"  # read when webdataset is imported: no pickles, no pipes
    import webdataset

    partial = path.with_name(f".{path.name}.{os.getpid()}.part")
    written: dict[str, Packed] = {}
    crcs: dict[str, dict[str, int]] = {}
    with writing(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            with partial.open("wb") as file:
                with webdataset.TarWriter(file, encoder=False, user="", group="", mtime=0) as tar:
                    for sample in samples:
                        packed = packed_sample(sample) if isinstance(sample, Sample) else sample
                        check_key(path, packed.key, written)
                        members = {s[1:]: data for s, data in packed.members.items()}
                        tar.write({"__key__": packed.key} | members)
                        crcs[packed.key] = {s: zlib.crc32(d) for s, d in packed.members.items()}
                        written[packed.key] = Packed(packed.key, {}, packed.width, packed.height)
                file.flush()
                os.fsync(file.fileno())
            index_path(path).unlink(missing_ok=True)  # of an older shard
            partial.replace(path)
            fsync_folder(path.parent)
        finally:
            partial.unlink(missing_ok=True)
    table = table_of_written(path, written, crcs, made)
    save_table(table, index_path(path))
    return table


def check_key(path: Path, key: str, written: Mapping[str, Packed]) -> None:
    fault = fault_in_name(f"{key}.x") or (("key with a dot", shown(key)) if "." in key else None)
    if fault or key in written:
        raise BadSample(f"{path}!{shown(key)}", *(fault or ("duplicate key",)))


def table_of_written(
    path: Path,
    written: Mapping[str, Packed],
    crcs: Mapping[str, dict[str, int]],
    made: Mapping[str, Any] | None,
) -> Table:
    with path.open("rb") as file:
        size = os.fstat(file.fileno()).st_size
        found, faults = members_of(path, file.fileno(), size)
    assert not faults and found.keys() == written.keys(), f"{path} was not written as meant"
    rows = [
        Row(key, spans, written[key].width, written[key].height, crcs[key])
        for key, spans in found.items()
    ]
    facts: dict[str, Any] = {"bytes": size, "sha256": sha256_file(path)}
    if made is not None:
        facts["made"] = dict(made)
    return table_of(path, rows, [], facts)


def packed_sample(sample: Sample, dtype: Dtype = "float32") -> Packed:
    """The members of a sample; the image as PNG, so that nothing is lost."""
    height, width = sample.image.shape[-2:]
    members = {".png": encode_png(sample.image), FACTS: packed_facts(sample.facts, width, height)}
    if sample.caption:
        members[CAPTION] = sample.caption.encode()
    if sample.latent is not None:
        members[LATENT] = pack({"latent": sample.latent}, dtype)
    if sample.text is not None:
        members[TEXT] = pack(sample.text, dtype)
    return Packed(sample.key, members, width, height)


def packed_facts(facts: Mapping[str, Any], width: int, height: int) -> bytes:
    return json.dumps({**facts, "width": width, "height": height}, sort_keys=True).encode()
