"""manifest.json: the size and sha256 of every file in a folder, and of itself.

Its bytes are canonical, so that any change in it, even of a space, shows.
"""

import hashlib
import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

from asymlift.artifacts.files import sha256_file, write_bytes_atomically
from asymlift.artifacts.parsing import parse_json, read_small
from asymlift.errors import BadData

NAME = "manifest.json"
FORMAT = 1


@dataclass(frozen=True)
class Manifest:
    """What a folder holds: `files` maps a relative path to (size, sha256)."""

    kind: str
    facts: dict[str, Any]
    files: dict[str, tuple[int, str]]


def canonical_json(value: object) -> bytes:
    """The one way in which we write JSON: sorted keys, ASCII, two spaces, a final newline."""
    return (json.dumps(value, indent=2, sort_keys=True, allow_nan=False) + "\n").encode("ascii")


def digest_json(value: object) -> str:
    """The sha256 of a value's canonical JSON, as 'sha256:...'."""
    return "sha256:" + hashlib.sha256(canonical_json(value)).hexdigest()


def list_files(folder: Path) -> list[str]:
    """Relative paths of all files below a folder, sorted, without the manifest itself."""
    found = [
        (Path(root) / name).relative_to(folder).as_posix()
        for root, _, names in os.walk(folder)
        for name in names
    ]
    return sorted(name for name in found if name != NAME)


def write_manifest(
    folder: Path, *, kind: str, facts: dict[str, Any], known: Mapping[str, str] | None = None
) -> None:
    """Describe every file that is in `folder` now. Written last: it makes the folder complete.

    `known` holds sha256s that need not be computed again.
    """
    known = known or {}
    files = {
        name: {
            "size": (folder / name).stat().st_size,
            "sha256": known.get(name) or sha256_file(folder / name),
        }
        for name in list_files(folder)
    }
    body: dict[str, Any] = {"format": FORMAT, "kind": kind, "facts": facts, "files": files}
    body["digest"] = digest_json(body)
    write_bytes_atomically(folder / NAME, canonical_json(body))


def read_manifest(folder: Path) -> Manifest:
    """Read a manifest that is exactly as it was written; the files are not looked at."""
    path = folder / NAME
    try:
        data = read_small(path)
    except FileNotFoundError:
        raise BadData(f"{folder}: there is no {NAME}, so the folder is not complete.") from None
    except OSError as error:
        raise BadData(f"{path}: cannot be read ({error.strerror}).") from error
    try:
        body = parse_json(data)
        stated = body.pop("digest")
        intact = stated == digest_json(body) and canonical_json({**body, "digest": stated}) == data
    except (ValueError, KeyError, TypeError, AttributeError):
        intact = False
    if not intact:
        raise BadData(f"{path}: damaged (it does not match its own digest). Make it again.")
    if body.get("format") != FORMAT:
        raise BadData(f"{path}: format {body.get('format')!r}; this asymlift reads {FORMAT}.")
    try:
        kind, facts = body["kind"], dict(body["facts"])
        files = {name: (entry["size"], entry["sha256"]) for name, entry in body["files"].items()}
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise BadData(f"{path}: not as a manifest is ({type(error).__name__}: {error}).") from None
    for name in files:
        pure = PurePosixPath(name)
        if pure.is_absolute() or ".." in pure.parts or pure.as_posix() != name or "\\" in name:
            raise BadData(f"{path}: {name!r} is not a path inside the folder.")
    return Manifest(kind, facts, files)


def check_manifest(folder: Path) -> list[str]:
    """Compare a folder with its manifest, byte for byte: one sentence per problem, [] if whole."""
    try:
        manifest = read_manifest(folder)
    except BadData as error:
        return [str(error)]
    present = set(list_files(folder))
    problems = [f"{name}: not in the manifest" for name in sorted(present - set(manifest.files))]
    for name, (size, sha256) in manifest.files.items():
        path = folder / name
        if name not in present:
            problems.append(f"{name}: missing")
        elif not path.is_file():
            problems.append(f"{name}: not a readable file")
        elif not path.resolve().is_relative_to(folder.resolve()):
            problems.append(f"{name}: a link that leads out of the folder")
        elif path.stat().st_size != size:
            problems.append(f"{name}: {path.stat().st_size} bytes, the manifest says {size}")
        elif sha256_file(path) != sha256:
            problems.append(f"{name}: its bytes have changed (sha256 differs)")
    return problems
