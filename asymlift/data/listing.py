"""Folders of pictures with captions, and tables of them, as records; no picture is opened.

photos/a.png, photos/a.txt              a folder: captions beside the pictures
photos/metadata.jsonl, .csv, .parquet   ... or in a table beside them
any.jsonl, .csv, .parquet               a table alone, paths relative to its folder
"""

import csv
import gc
import json
import os
import re
import stat
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from hashlib import blake2b
from operator import attrgetter
from pathlib import Path
from typing import IO, Any

from asymlift.data.records import (
    CAPTION,
    FACTS,
    IMAGE_SUFFIXES,
    MOST_BYTES,
    MOST_TEXT,
    BadSample,
    OnBad,
    Part,
    Record,
    inline,
)
from asymlift.errors import BadData, Unavailable

FOREIGN = (".gif", ".tif", ".tiff", ".bmp", ".heic", ".avif", ".jxl", ".svg", ".eps", ".jp2")
IMAGE_COLUMNS = ("file_name", "image", "image_path", "path")
CAPTION_COLUMNS = ("text", "caption", "prompt", "captions")
UNNAMED = "not in the metadata"
FOLDER = "folder"  # labels that are names of folders
MAX_LABEL = 999_999  # there is a class name for every number up to the largest label
KEY_LENGTH = 120  # keys become file names, which may have 255 bytes with their endings
NAMED = 2  # faults in a message
TOLD = 1000  # pictures between two words about progress
PARQUET_ROWS = 256  # that are in memory at a time, pictures included
MAGIC = {".jpg": rb"\xff\xd8\xff", ".png": rb"\x89PNG\r\n\x1a\n", ".webp": rb"RIFF.{4}WEBP"}

Row = dict[str, Any]


@dataclass(frozen=True)
class Listing:
    """What a folder or a table holds."""

    records: list[Record]  # sorted by key; width and height are 0: not read yet
    class_names: list[str]  # label number -> name; empty where there are no labels
    about: str


@dataclass(slots=True)
class Picture:
    """A record to be, before classes are numbered and keys told apart."""

    source: str  # path relative to the root, or `table!row`
    stem: str  # what its key is made of
    where: str
    suffix: str
    image: Part
    caption: Part | None
    captions: list[str]  # all of them, where there are several
    label: int | str | None


@contextmanager
def without_garbage_collection() -> Iterator[None]:
    """Nothing here makes cycles, and looking for them takes 40% of the time of a long listing."""
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


@without_garbage_collection()
def list_pictures(
    path: Path,
    *,
    labels: str | None = None,
    caption_lines: bool = False,
    on_bad: OnBad,
    on_done: Callable[[int], None] = lambda count: None,
) -> Listing:
    """Records of a folder or a table; what cannot be one goes to `on_bad`.

    `labels` is "folder" (the first one below the root) or a column; with `caption_lines` every
    line of a .txt file is a caption.
    """
    first = list[BadSample]()

    def note(fault: BadSample) -> None:
        first.extend([fault] if len(first) < NAMED else [])
        on_bad(fault)

    if path.is_dir():
        table = metadata_of(path)
    elif path.is_file() and path.suffix.lower() in READERS:
        table = path
    else:
        what = "this is neither a folder nor a table" if path.exists() else "there is no such file"
        raise BadData(f"{path}: {what}; give a folder of pictures or a {choice(READERS)} file")
    if table is None:
        if labels not in (None, FOLDER):
            raise BadData(
                f"{path}: labels are to come from column {labels!r}, but there is no metadata "
                f"({choice(READERS)}); add one, or set labels to {FOLDER!r}"
            )
        pictures = list(counted(pictures_in_folder(path, labels, caption_lines, note), on_done))
    else:
        named: set[str] = set()
        pictures = list(counted(pictures_in_table(table, labels, named, note), on_done))
        if table is not path:
            report_unnamed(path, named, on_bad)
    if not pictures:
        said = f"{path}: holds no pictures that can be used"
        if first:
            raise BadData("\n".join([said, *map(str, first)]))
        raise BadData(f"{said}; pictures end in {choice(IMAGE_SUFFIXES)}")
    class_names = name_classes({p.label for p in pictures if p.label is not None})
    about = describe(pictures, class_names, "table" if table is path else "folder", table)
    return Listing(make_records(pictures, class_names, on_bad), class_names, about)


def counted(pictures: Iterable[Picture], on_done: Callable[[int], None]) -> Iterator[Picture]:
    for number, picture in enumerate(pictures, start=1):
        yield picture
        if number % TOLD == 0:
            on_done(TOLD)


def describe(pictures: list[Picture], class_names: list[str], kind: str, table: Path | None) -> str:
    captioned = sum(picture.caption is not None for picture in pictures)
    origin = f"captions from {table.name if table else 'text files'}"
    parts = [f"{kind} of {len(pictures)} image{'s' * (len(pictures) > 1)}"]
    if captioned == len(pictures):
        parts.append(origin)
    else:
        parts.append(f"{captioned} with {origin}" if captioned else "no captions")
    if class_names:
        parts.append(f"{len(class_names)} class{'es' * (len(class_names) > 1)}")
    return ", ".join(parts)


def choice(names: Iterable[str]) -> str:
    *most, last = names
    return f"{', '.join(most)} or {last}"


def shown(path: Path | str) -> str:
    """A path as messages name it: file names may hold anything, terminals obey some of it."""
    text = str(path)
    return text if text.isprintable() else ascii(text)


# ---- folders ---------------------------------------------------------------------------------


def walk(root: Path) -> Iterator[tuple[str, list[os.DirEntry[str]]]]:
    """(prefix of its paths, files in order) of each folder; linked folders last, none twice."""
    real = root.resolve()
    seen = {identity(folder.stat()) for folder in real.parents}  # a link to these is a cycle too
    folders, links = [(str(root), "")], list[tuple[str, str]]()
    while folders or links:
        folder, prefix = folders.pop() if folders else links.pop()
        try:
            node = identity(Path(folder).stat())
            if node in seen:
                continue
            with os.scandir(folder) as entries:
                visible = [entry for entry in entries if not entry.name.startswith(".")]
        except OSError as error:
            raise BadData(f"{shown(folder)}: cannot be read ({error.strerror})") from None
        seen.add(node)
        visible.sort(key=attrgetter("name"), reverse=True)  # stacks: the last is next
        files = []
        for entry in visible:
            if is_folder(entry):
                stack = links if entry.is_symlink() else folders
                stack.append((entry.path, f"{prefix}{entry.name}/"))
            else:
                files.append(entry)
        yield prefix, files[::-1]


def identity(info: os.stat_result) -> tuple[int, int]:
    return info.st_dev, info.st_ino


def is_folder(entry: os.DirEntry[str]) -> bool:
    try:
        return entry.is_dir()
    except OSError:  # a link to itself
        return False


def split(name: str) -> tuple[str, str]:
    """(stem, suffix in lower case); the suffix is empty for a hidden name."""
    stem, _, ending = name.rpartition(".")
    return (stem, f".{ending.lower()}") if stem else (name, "")


def pictures_in_folder(
    root: Path, labels: str | None, caption_lines: bool, on_bad: OnBad
) -> Iterator[Picture]:
    for prefix, entries in walk(root):
        folder = root / prefix
        files = [(entry, *split(entry.name)) for entry in entries]
        texts = {stem: entry for entry, stem, suffix in files if suffix == CAPTION}
        for entry, stem, suffix in files:
            if suffix not in IMAGE_SUFFIXES and suffix not in FOREIGN:
                continue
            source = prefix + entry.name
            where = shown(entry.path)
            try:
                image = image_part(folder / entry.name, suffix, where, entry.stat)
                caption, captions = text_file(folder, texts.get(stem), where, caption_lines)
                label = folder_of(source, where) if labels else None
            except BadSample as fault:
                on_bad(fault)
                continue
            yield Picture(source, prefix + stem, where, suffix, image, caption, captions, label)


def image_part(
    path: Path, suffix: str, where: str, read_status: Callable[[], os.stat_result]
) -> Part:
    try:
        info = read_status()
    except OSError as error:
        raise BadSample(where, "image is missing", error.strerror or "") from None
    except ValueError as error:  # a null byte, half a character
        raise BadSample(where, "image is missing", str(error)) from None
    if not stat.S_ISREG(info.st_mode):
        raise BadSample(where, "image is missing", "not a plain file")
    if suffix not in IMAGE_SUFFIXES:
        raise BadSample(where, "not a JPEG, PNG or WebP image")
    if info.st_size == 0:
        raise BadSample(where, "empty file")
    if info.st_size > MOST_BYTES:
        raise BadSample(where, "file is too large", f"{info.st_size} bytes")
    return Part(path, 0, info.st_size)


def text_file(
    folder: Path, entry: os.DirEntry[str] | None, where: str, caption_lines: bool
) -> tuple[Part | None, list[str]]:
    if entry is None:
        return None, []
    path = folder / entry.name
    try:
        info = entry.stat()
        if not stat.S_ISREG(info.st_mode):
            raise BadSample(where, "caption cannot be read", "not a plain file")
        if info.st_size > MOST_TEXT:
            raise BadSample(where, "caption cannot be read", f"{info.st_size} bytes")
        if caption_lines:
            return inline_captions(path.read_text("utf-8-sig").split("\n"), where)
    except OSError as error:
        raise BadSample(where, "caption cannot be read", error.strerror or "") from None
    except UnicodeDecodeError:
        raise BadSample(where, "caption is not UTF-8") from None
    return (Part(path, 0, info.st_size) if info.st_size else None), []


def inline_captions(captions: list[str], where: str) -> tuple[Part | None, list[str]]:
    """(the first caption, all captions where there are several)."""
    captions = [caption.strip() for caption in captions if caption.strip()]
    try:
        encoded = [caption.encode("utf-8") for caption in captions]
    except UnicodeEncodeError:  # JSON can spell half a character
        raise BadSample(where, "caption is not UTF-8") from None
    return inline(encoded[0]) if encoded else None, captions if len(captions) > 1 else []


def folder_of(source: str, where: str) -> str:
    folder, slash, _ = source.partition("/")
    if not slash or folder in ("", ".."):
        raise BadSample(where, "no class label", "not in a folder below the root")
    return folder


# ---- tables ----------------------------------------------------------------------------------


def metadata_of(root: Path) -> Path | None:
    tables = [root / f"metadata{suffix}" for suffix in READERS]
    there = [table for table in tables if table.is_file()]
    if len(there) > 1:
        names = " and ".join(table.name for table in there)
        raise BadData(f"{root}: holds {names}, which may contradict each other; keep one")
    return there[0] if there else None


def pictures_in_table(
    table: Path, labels: str | None, named: set[str], on_bad: OnBad
) -> Iterator[Picture]:
    """The pictures of each row; `named` collects the files that the table names."""
    root = Path(os.path.normpath(table.parent.absolute()))
    roots = [str(root), str(root.resolve())]
    for number, row in READERS[table.suffix.lower()](table, labels, on_bad):
        try:
            picture = picture_in_row(row, number, table, roots, named)
            if labels == FOLDER:
                picture.label = folder_of(picture.source, picture.where)
            elif labels:
                picture.label = label_in(row, labels, picture.where)
        except BadSample as fault:
            on_bad(fault)
        else:
            yield picture


def picture_in_row(
    row: Row, number: int, table: Path, roots: list[str], named: set[str]
) -> Picture:
    where = f"{shown(table)}!{number}"
    cells = [row[column] for column in IMAGE_COLUMNS if row.get(column) is not None]
    embedded = (cell for cell in cells if isinstance(cell, bytes | dict))
    cell = next(embedded, cells[0] if cells else None)
    if isinstance(cell, dict):  # {"bytes", "path"}, as Hugging Face writes
        data = cell.get("bytes")
        cell = data if isinstance(data, bytes) else cell.get("path")
    if isinstance(cell, bytes):
        suffix, image = suffix_of(cell, where), inline(cell)
        source, stem = f"{table.name}!{number}", f"{table.stem}-{number}"
    else:
        if not isinstance(cell, str) or not cell:
            raise BadSample(where, "image is missing", "the row names none")
        if "://" in cell:
            raise BadSample(where, "image is a URL", shown(cell))
        path, source = table.parent / cell, source_of(cell, roots)
        where = shown(path)
        if source in named:
            raise BadSample(where, "listed twice")
        named.add(source)
        stem, suffix = split(source)
        image = image_part(path, suffix, where, path.stat)
    caption, captions = inline_captions(captions_in(row, where), where)
    return Picture(source, stem, where, suffix, image, caption, captions, None)


def suffix_of(data: bytes, where: str) -> str:
    if not data:
        raise BadSample(where, "empty file")
    for suffix, magic in MAGIC.items():
        if re.match(magic, data, re.DOTALL):
            return suffix
    raise BadSample(where, "not a JPEG, PNG or WebP image")


def source_of(name: str, roots: list[str]) -> str:
    """The path below the root however a table spells it; outside, relative if it was so."""
    full = os.path.normpath(name if name.startswith("/") else f"{roots[0]}/{name}")
    for root in roots:
        if full.startswith(f"{root}/"):
            return full.removeprefix(f"{root}/")
    return full if name.startswith("/") else os.path.relpath(full, roots[0])


def captions_in(row: Row, where: str) -> list[str]:
    cell = next((row[column] for column in CAPTION_COLUMNS if column in row), None)
    captions = [] if cell is None else [cell] if isinstance(cell, str) else cell
    if not isinstance(captions, list) or not all(isinstance(text, str) for text in captions):
        raise BadSample(where, "caption is not text")
    return captions


def label_in(row: Row, column: str, where: str) -> int | str:
    cell = row.get(column)
    if isinstance(cell, float) and cell.is_integer():  # integers of a column with gaps
        cell = int(cell)
    if isinstance(cell, str) and cell.strip():
        return cell.strip()
    if isinstance(cell, bool):
        return str(cell)
    if not isinstance(cell, int) or cell < 0:  # -1 says "unknown" in many tables
        raise BadSample(where, "no class label", f"column {column}")
    if cell > MAX_LABEL:
        raise BadSample(where, "class label is too large", f"{cell}, the limit is {MAX_LABEL}")
    return cell


def report_unnamed(root: Path, named: set[str], on_bad: OnBad) -> None:
    for prefix, entries in walk(root):
        for entry in entries:
            if split(entry.name)[1] in IMAGE_SUFFIXES and prefix + entry.name not in named:
                on_bad(BadSample(shown(entry.path), UNNAMED))


# ---- rows: (number, cells), one at a time ----------------------------------------------------


def json_rows(table: Path, labels: str | None, on_bad: OnBad) -> Iterator[tuple[int, Row]]:
    known = False
    with open_table(table, "rb") as file:
        for number, line in enumerate(file, start=1):
            if not line.strip():
                continue
            try:
                row = json.loads(line)
            except (ValueError, RecursionError) as error:
                on_bad(unreadable(table, number, str(error)))
                continue
            if not isinstance(row, dict):
                on_bad(unreadable(table, number, "not a JSON object"))
                continue
            if not known:  # other columns may be missing in some rows
                check_columns(table, row, None)
                known = True
            yield number, row


def csv_rows(table: Path, labels: str | None, on_bad: OnBad) -> Iterator[tuple[int, Row]]:
    csv.field_size_limit(2**31 - 1)
    with open_table(table, "r", encoding="utf-8-sig", errors="surrogateescape", newline="") as file:
        reader = csv.reader(file, strict=True)
        columns: list[str] = []
        while True:
            number = reader.line_num + 1  # a row may have several lines
            try:
                cells = next(reader)
                "".join(cells).encode("utf-8")
            except StopIteration:
                return
            except UnicodeEncodeError:
                on_bad(unreadable(table, number, "not UTF-8"))
                continue
            except csv.Error as error:  # a quote that is not closed swallows what follows
                lost = max(reader.line_num - number + 1, 1)
                on_bad(unreadable(table, number, str(error), count=lost))
                continue
            if not cells:
                continue
            if not columns:
                columns = [cell.strip() for cell in cells]
                check_columns(table, columns, labels)
            elif len(cells) != len(columns):
                why = f"{len(cells)} fields, not {len(columns)}"
                on_bad(unreadable(table, number, why))
            else:
                row: Row = dict(zip(columns, cells, strict=True))
                if row.get("captions", "").startswith("["):
                    try:
                        row["captions"] = json.loads(row["captions"])
                    except (ValueError, RecursionError):
                        on_bad(unreadable(table, number, "captions are not a JSON list"))
                        continue
                if labels and INTEGER.fullmatch(row.get(labels, "")):
                    row[labels] = int(row[labels])
                yield number, row


INTEGER = re.compile(r"-?(0|[1-9][0-9]{0,8})")


def parquet_rows(table: Path, labels: str | None, on_bad: OnBad) -> Iterator[tuple[int, Row]]:
    try:
        from pyarrow import ArrowException
        from pyarrow.parquet import ParquetFile
    except ImportError:
        raise Unavailable(
            f"{table}: reading parquet needs pyarrow; run pip install 'asymlift[parquet]'"
        ) from None
    first = 0
    try:
        with ParquetFile(table) as file:
            columns = file.schema_arrow.names
            check_columns(table, columns, labels)
            wanted = [c for c in columns if c in (*IMAGE_COLUMNS, *CAPTION_COLUMNS, labels)]
            for batch in file.iter_batches(PARQUET_ROWS, columns=wanted):
                yield from enumerate(batch.to_pylist(), start=first)
                first += len(batch)
    except (ArrowException, OSError, ValueError) as error:
        why = " ".join(str(error).split())[:100]
        raise BadData(f"{table}: damaged, or not a parquet file ({why}); make it again") from None


READERS: dict[str, Callable[[Path, str | None, OnBad], Iterator[tuple[int, Row]]]] = {
    ".jsonl": json_rows,
    ".csv": csv_rows,
    ".parquet": parquet_rows,
}


def open_table(table: Path, mode: str, **how: Any) -> IO[Any]:
    try:
        return table.open(mode, **how)
    except OSError as error:
        raise BadData(f"{table}: cannot be read ({error.strerror})") from None


def unreadable(table: Path, number: int, why: str, *, count: int = 1) -> BadSample:
    detail = f"line {number}: {why}"
    return BadSample(shown(table), "metadata line cannot be read", detail, count=count)


def check_columns(table: Path, columns: Iterable[str], labels: str | None) -> None:
    columns = list(columns)
    there = ", ".join(shown(column[:40]) for column in columns[:20]) or "none"
    if not set(columns) & set(IMAGE_COLUMNS):
        raise BadData(
            f"{table}: no column names the image; there are: {there}; "
            f"known: {choice(IMAGE_COLUMNS)}"
        )
    if labels not in (None, FOLDER, *columns):
        raise BadData(f"{table}: there is no column {labels} for labels; there are: {there}")


# ---- classes and keys ------------------------------------------------------------------------


def name_classes(labels: set[int | str]) -> list[str]:
    """Label number -> name: integers stay what they are, names are numbered in order."""
    numbers = [label for label in labels if isinstance(label, int)]
    if numbers and len(numbers) == len(labels):
        return [str(number) for number in range(max(numbers) + 1)]
    return sorted({str(label) for label in labels})


def make_records(pictures: list[Picture], class_names: list[str], on_bad: OnBad) -> list[Record]:
    numbers = {name: number for number, name in enumerate(class_names)}
    uses = Counter(picture.stem for picture in pictures)
    records: dict[str, Record] = {}
    for picture in pictures:
        stem = picture.stem
        key = stem if uses[stem] == 1 and PLAIN.fullmatch(stem) else hashed_key(picture)
        if key in records:
            on_bad(BadSample(picture.where, "duplicate key", key))
            continue
        facts: dict[str, Any] = {"captions": picture.captions} if picture.captions else {}
        if picture.label is not None:
            name = str(picture.label)
            facts |= {"label": numbers[name], "class": name}
        facts["source"] = picture.source
        parts = {picture.suffix: picture.image}
        if picture.caption is not None:
            parts[CAPTION] = picture.caption
        parts[FACTS] = inline(json.dumps(facts).encode())
        records[key] = Record(key, picture.where, parts, 0, 0)
    return [records[key] for key in sorted(records)]


PLAIN = re.compile(rf"[A-Za-z0-9_-]{{1,{KEY_LENGTH}}}")  # no slash: only files of the root


def hashed_key(picture: Picture) -> str:
    readable = re.sub(r"[^A-Za-z0-9_-]", "-", picture.stem)[-KEY_LENGTH:]
    return f"{readable}-{blake2b(os.fsencode(picture.source), digest_size=4).hexdigest()}"
