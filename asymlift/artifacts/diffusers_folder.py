"""A diffusers pipeline folder, read without diffusers: JSON and safetensors, never pickle."""

import json
import os
import re
import shlex
from collections.abc import Iterable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path, PurePosixPath
from typing import Any

from asymlift.artifacts.files import sha256_file
from asymlift.artifacts.manifest import digest_json
from asymlift.artifacts.parsing import parse_json, read_small
from asymlift.artifacts.safetensors_stream import Header, read_header
from asymlift.errors import BadData

# What a pipeline is made of; modular ones write the second, and of both the first holds: it is of
# what lies beside it and of the pipelines that families are proven with, while entries of the
# second may lead to other repositories.
INDEXES = ("model_index.json", "modular_model_index.json")
STEMS = ("diffusion_pytorch_model", "model")  # what diffusers and transformers call weights
CONFIGS = (
    "config.json",
    "scheduler_config.json",
    "tokenizer_config.json",
    "preprocessor_config.json",
    "processor_config.json",
)
PICKLES = {".bin", ".pt", ".pth", ".ckpt", ".pkl", ".pickle"}
TEXT_NETS = ("text_encoder", "text_conditioner")  # how the names of what embeds prompts begin
HUB_NAME = re.compile(r"[\w.-]+/[\w.-]+")  # OWNER/NAME
# Not part of what a component computes: saving the same weights again changes them.
INCIDENTAL = ("_diffusers_version", "_name_or_path", "transformers_version")


@dataclass(frozen=True)
class Loading:
    """From where a modular pipeline loads a part."""

    repo: str | None  # on the hub, or a folder; None: nobody has given this part
    subfolder: str
    revision: str | None
    hint: tuple[Any, Any]  # library and class, where none was loaded when it was saved

    @classmethod
    def of(cls, index: Path, name: str, entry: object) -> "Loading | None":
        """What an entry of three says; None for any other."""
        if not (isinstance(entry, list) and len(entry) == 3 and isinstance(entry[2], dict)):
            return None
        check_component_name(index, name)
        said = {key: value for key, value in entry[2].items() if value is not None}
        repo = said.get("pretrained_model_name_or_path", said.get("repo", ""))
        subfolder, revision = said.get("subfolder", ""), said.get("revision", "")
        if not all(isinstance(text, str) for text in (repo, subfolder, revision)):
            raise BadData(f"{index}: does not say in words from where {name} is loaded.")
        parts = PurePosixPath(subfolder)
        if parts.is_absolute() or ".." in parts.parts or set(subfolder) & set("\\\0"):
            raise BadData(f"{index}: takes {name} from {subfolder!r}, which leads out of a folder.")
        hint = said.get("type_hint", (None, None))
        if not (isinstance(hint, list | tuple) and len(hint) == 2):
            raise BadData(f"{index}: the type_hint of {name} is no library and class.")
        return cls(repo or None, subfolder, revision or None, (hint[0], hint[1]))

    def how_to_get(self, folder: Path, name: str) -> str:
        """What makes FOLDER/name of it."""
        if self.repo is None:
            return f"put it into {folder / name}"
        if not HUB_NAME.fullmatch(self.repo) or Path(self.repo).is_dir():
            source = "/".join(part for part in (self.repo, self.subfolder) if part)
            return f"put what is in {source} into {folder / name}"
        inside = f" --include {shlex.quote(self.subfolder + '/*')}" if self.subfolder else ""
        revision = f" --revision {shlex.quote(self.revision)}" if self.revision else ""
        target = shlex.quote(str(folder if self.subfolder else folder / name))
        get = f"`hf download {self.repo}{inside}{revision} --local-dir {target}`"
        if self.subfolder in ("", name):
            return get
        return f"{get}, then rename {folder / self.subfolder} to {folder / name}"


class DiffusersFolder:
    """What convert, loading and fingerprints need to know about a pipeline folder."""

    def __init__(self, path: Path, known: Mapping[str, tuple[int, str]] | None = None) -> None:
        """`known` says size and sha256 of files that need not be read, as a manifest does."""
        self.path, self.known = path, known or {}
        self._sha256: dict[Path, Future[str]] = {}
        if not path.is_dir():
            raise BadData(f"{path}: there is no such folder.")
        index = pipeline_index(path)
        if index is None:
            raise BadData(
                f"{path}: not a diffusers pipeline folder: it has no {' and no '.join(INDEXES)}. "
                "Give the folder that holds transformer/ and vae/."
            )
        self.index = index

    def own(self, path: Path) -> Path:
        """Return a file of this folder. No link is followed out of it, nothing else is read."""
        self._refuse_led_out(path)
        if not path.is_file():
            raise BadData(f"{path}: no file, but a folder, a device, a pipe or a broken link.")
        return path

    def _refuse_led_out(self, path: Path) -> None:
        """Nothing of this machine gets into what is made of a folder, and perhaps published."""
        try:
            real = path.resolve()
        except (OSError, RuntimeError) as error:  # a link that leads to itself
            raise BadData(f"{path}: a broken link.") from error
        if not any(real.is_relative_to(place) for place in self._places):
            raise BadData(
                f"{path}: a link that leads out of {self.path}, to {real}. "
                "If that belongs to the model, put it there itself."
            )

    @cached_property
    def _places(self) -> list[Path]:
        """Where links may lead: into the folder, and for a snapshot of the hub to its blobs."""
        folder = self.path.resolve()
        blobs = folder.parent.parent / "blobs"
        return [folder, blobs] if folder.parent.name == "snapshots" else [folder]

    def files(self, component: str) -> dict[str, Path]:
        """All files of a component by their relative paths, sorted; none is hidden."""
        top = self.folder(component)
        found = {}
        for root, folders, names in os.walk(top):
            here = Path(root)
            links = [name for name in folders if (here / name).is_symlink()]
            for path in (here / name for name in (*names, *links)):
                found[path.relative_to(top).as_posix()] = path
        return {name: self.own(found[name]) for name in sorted(found) if not name.startswith(".")}

    @cached_property
    def model_index(self) -> dict[str, Any]:
        """What the index says, a component as [library, class], whichever file it is from."""
        return {name: self._plain_entry(name, entry) for name, entry in self._index.items()}

    @cached_property
    def _index(self) -> dict[str, Any]:
        return read_json(self.own(self.index))

    def _plain_entry(self, name: str, entry: Any) -> Any:
        loading = Loading.of(self.index, name, entry)
        if loading is None:
            return entry
        library, class_name = entry[:2] if entry[1] is not None else loading.hint
        absent = entry[1] is None and loading.repo is None and not (self.path / name).is_dir()
        return [None, None] if absent else [library, class_name]

    @property
    def components(self) -> dict[str, str]:
        """Component name -> class name, as the index has them."""
        found = {
            name: entry[1]
            for name, entry in self.model_index.items()
            if not name.startswith("_") and isinstance(entry, list) and len(entry) == 2 and entry[1]
        }
        for name in found:
            check_component_name(self.index, name)
        return found

    def has(self, component: str) -> bool:
        """Whether a component is named in model_index.json, and there."""
        return component in self.components and (self.path / component).is_dir()

    def folder(self, component: str) -> Path:
        """The folder of a component that must be there: never another's, never fetched."""
        folder = self.path / component
        loading = Loading.of(self.index, component, self._index.get(component))
        elsewhere = loading.subfolder if loading else ""
        if elsewhere not in ("", component) and (self.path / elsewhere).is_dir():
            raise BadData(  # diffusers would read that one, whatever else is there
                f"{self.index}: has {component} in {elsewhere}/, but it is read from "
                f"{component}/ only. Rename the folder, and its `subfolder` in the index."
            )
        if folder.is_dir():
            self._refuse_led_out(folder)
            return folder
        if loading is None:
            raise BadData(f"{self.path}: there is no {component}/ in this pipeline folder.")
        raise BadData(
            f"{self.path}: there is no {component}/ in this pipeline folder; {self.index.name} "
            f"takes it from {loading.repo or 'there'}, and nothing is downloaded unasked. "
            f"To have it: {loading.how_to_get(self.path, component)}"
        )

    def own_indexes(self) -> dict[str, bytes]:
        """The index files that may point elsewhere, as a copy of this folder has to have them.

        diffusers looks in the copy for what has no repository; what is not here keeps its own.
        """
        found = {}
        for path in (self.path / name for name in INDEXES):
            index = read_json(self.own(path)) if path.is_file() else {}
            own = {name: self._own_entry(path, name, entry) for name, entry in index.items()}
            if own != index:
                found[path.name] = (json.dumps(own, indent=2) + "\n").encode()
        return found

    def _own_entry(self, index: Path, name: str, entry: Any) -> Any:
        loading = Loading.of(index, name, entry)
        if loading is None or not (self.path / name).is_dir():
            return entry
        library, class_name, said = entry
        kept = {key: value for key, value in said.items() if key != "repo"}
        own = {"pretrained_model_name_or_path": None, "subfolder": name}
        hint = loading.hint if class_name is None else (library, class_name)
        plain = {"variant": None, "revision": None, "type_hint": list(hint)}
        return [library, class_name, kept | own | plain]

    @property
    def text_nets(self) -> list[str]:
        """The networks that turn a prompt into embeddings."""
        return [name for name in self.components if name.startswith(TEXT_NETS)]

    def config(self, component: str) -> dict[str, Any]:
        """The component's JSON config, whatever its kind calls it."""
        folder = self.folder(component)
        for name in CONFIGS:
            if (folder / name).is_file():
                return read_json(self.own(folder / name))
        raise BadData(f"{folder}: there is no config.json.")

    def index_path(self, component: str) -> Path | None:
        """The JSON index of a component whose weights are in shards; None if there is none."""
        index = index_path(self.folder(component))
        return index and self.own(index)

    def weight_files(self, component: str) -> list[Path]:
        """The safetensors files of a component, sorted by name; pickles are refused."""
        self.index_path(component)
        return [self.own(path) for path in weight_files(self.folder(component))]

    def headers(self, component: str) -> dict[Path, Header]:
        """Every weight file of a component with its tensors, checked against the index."""
        self.weight_files(component)
        return weight_headers(self.folder(component))

    @cached_property
    def license(self) -> str | None:
        """The license fields at the head of the model card, if there is one."""
        named = (path for path in self.path.iterdir() if path.name.lower() == "readme.md")
        card = next((path for path in named if path.is_file()), None)
        if card is None:
            return None
        try:
            data = read_small(self.own(card))
        except OSError as error:
            raise BadData(f"{card}: cannot be read ({error.strerror}).") from error
        head = data.decode(errors="replace").split("\n---", 1)[0]
        found = re.findall(r"^license(?:_name|_link)?:[ \t]*(\S.*?)\s*$", head, re.MULTILINE)
        return ", ".join(found) or None

    def sha256(self, path: Path) -> str:
        """Digest of one file of this folder, computed once."""
        if stated := self.stated_sha256(path):
            return stated
        future = self._sha256.get(path)
        if future is None or future.cancelled():
            with ThreadPoolExecutor(1) as pool:
                future = self._sha256[path] = pool.submit(_digest, path)
        return future.result()

    def stated_sha256(self, path: Path) -> str | None:
        if not self.known:
            return None
        size, stated = self.known.get(path.relative_to(self.path).as_posix(), (0, ""))
        return stated if path.is_file() and path.stat().st_size == size else None

    @contextmanager
    def hashing_ahead(self, paths: Iterable[Path]) -> Iterator[None]:
        """Compute digests in the background; `sha256` waits for those that it needs."""
        workers = min(4, os.cpu_count() or 1)
        with ThreadPoolExecutor(workers) as pool:  # hashing does not hold the interpreter's lock
            for path in paths:
                if path not in self._sha256 and not self.stated_sha256(path):
                    self._sha256[path] = pool.submit(_digest, path)
            try:
                yield
            finally:
                pool.shutdown(cancel_futures=True)

    def fingerprint(self, component: str) -> str:
        """'sha256:...' of a component's weights and of what its config computes."""
        config = {k: v for k, v in self.config(component).items() if k not in INCIDENTAL}
        weights = {path.name: self.sha256(path) for path in self.weight_files(component)}
        return digest_json({"config": config, "weights": weights})

    def text_fingerprint(self, *, has_encoder: bool = True) -> str | None:
        """'sha256:...' of all that turns a prompt into embeddings; None where nothing does.

        Without an encoder it is a tokenizer, or a list of labels, that the transformer relies on.
        """
        there = [name for name in self.components if (self.path / name).is_dir()]
        encoders = [name for name in self.text_nets if name in there]
        if has_encoder and not encoders:
            return None
        labels = {} if has_encoder else {"labels": self.model_index.get("id2label")}
        files = {
            f"{name}/{file}": path
            for name in there
            if name.startswith(("tokenizer", "processor")) or name.endswith("_tokenizer")
            for file, path in self.files(name).items()
        }
        weights = [path for name in encoders for path in self.weight_files(name)]
        with self.hashing_ahead([*weights, *files.values()]):
            return digest_json(
                {
                    "encoders": {name: self.fingerprint(name) for name in encoders},
                    "files": {name: self.sha256(path) for name, path in files.items()},
                    **labels,
                }
            )


def _digest(path: Path) -> str:
    try:
        return sha256_file(path)
    except OSError as error:
        raise BadData(f"{path}: cannot be read ({error.strerror}).") from error


def pipeline_index(folder: Path) -> Path | None:
    """The index that says what a pipeline folder holds; None where there is none."""
    return next((folder / name for name in INDEXES if (folder / name).is_file()), None)


def index_path(folder: Path) -> Path | None:
    """The JSON index of a component's folder whose weights are in shards."""
    paths = [folder / f"{stem}.safetensors.index.json" for stem in STEMS]
    return next((path for path in paths if path.is_file()), None)


def weight_files(folder: Path) -> list[Path]:
    """The safetensors files of a component's folder, sorted by name; pickles are refused."""
    index = index_path(folder)
    if index is not None:
        names = sorted(set(read_index(index)["weight_map"].values()))
        missing = [name for name in names if not (folder / name).is_file()]
        if missing:
            raise BadData(f"{folder}: {missing[0]} is missing, {index.name} names it.")
        return [folder / name for name in names]
    for stem in STEMS:
        if (folder / f"{stem}.safetensors").is_file():
            return [folder / f"{stem}.safetensors"]
    names = sorted(path.name for path in folder.iterdir())
    pickles = [name for name in names if Path(name).suffix in PICKLES]
    if pickles and not any(name.endswith(".safetensors") for name in names):
        raise BadData(
            f"{folder / pickles[0]}: a pickle, which can run code when it is read. "
            "Only safetensors are read: save it again with safe_serialization=True."
        )
    raise BadData(
        f"{folder}: no weights called diffusion_pytorch_model.safetensors here, nor an "
        f"index of shards. It holds: {', '.join(names[:5]) or 'nothing'}."
    )


def weight_headers(folder: Path) -> dict[Path, Header]:
    """Every weight file of a component's folder with its tensors, checked against the index."""
    headers = {path: read_header(path) for path in weight_files(folder)}
    found: dict[str, str] = {}
    for path, header in headers.items():
        for name in header.tensors:
            if name in found:
                raise BadData(f"{path}: {name} is in {found[name]} too.")
            found[name] = path.name
    index = index_path(folder)
    if index is not None:
        weight_map = read_index(index)["weight_map"]
        for name in sorted(found.keys() | weight_map.keys()):
            if found.get(name) != weight_map.get(name):
                raise BadData(
                    f"{index}: says that {name} is in {weight_map.get(name, 'no file')}, "
                    f"but it is in {found.get(name, 'no file')}."
                )
    return headers


def read_index(path: Path) -> dict[str, Any]:
    """A weights index whose file names are plain: none leads out of its folder."""
    index = read_json(path)
    weight_map = index.get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise BadData(f"{path}: has no weight_map.")
    for name, file in weight_map.items():
        if not isinstance(file, str) or not is_plain_name(file):
            raise BadData(f"{path}: {name} is said to be in {file!r}, which is no plain file name.")
        if not file.endswith(".safetensors"):
            raise BadData(f"{path}: {name} is said to be in {file!r}; only safetensors are read.")
    return index


def check_component_name(index: Path, name: str) -> None:
    """Refuse a component of an index whose folder would be outside the pipeline's."""
    if not is_plain_name(name):
        raise BadData(f"{index}: names a component {name!r}, which is no plain folder name.")


def is_plain_name(name: str) -> bool:
    """Whether a name stays in its folder: no separators, no parent, nothing hidden."""
    return bool(name) and not name.startswith(".") and not set(name) & set("/\\\0")


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object from a file."""
    try:
        value = parse_json(read_small(path))
    except FileNotFoundError:
        raise BadData(f"{path}: there is no such file; is {path.parent} whole?") from None
    except OSError as error:
        raise BadData(f"{path}: cannot be read ({error.strerror}).") from error
    except ValueError as error:
        raise BadData(f"{path}: not JSON ({error}).") from error
    if not isinstance(value, dict):
        raise BadData(f"{path}: holds {type(value).__name__}, not a JSON object.")
    return value
