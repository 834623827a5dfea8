"""What a file or folder is: its kind, its origin, its numbers, from headers and JSON alone."""

import json
import math
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from asymlift.artifacts import checkpoint, lifted_folder, manifest
from asymlift.artifacts.basis_file import has_checksum, load_basis
from asymlift.artifacts.diffusers_folder import INDEXES, DiffusersFolder, pipeline_index, read_json
from asymlift.artifacts.files import human_bytes
from asymlift.artifacts.lifted_folder import read_lifted
from asymlift.artifacts.lifted_weights import check_stored_maps
from asymlift.artifacts.safetensors_stream import Header, TensorInfo, read_header
from asymlift.errors import BadData, UserError
from asymlift.families import find_family
from asymlift.families.base import Family, Geometry
from asymlift.maths.schedule import pixel_shift
from asymlift.model.trained_weights import DOWN, UP
from asymlift.recipe import load_recipe
from asymlift.runtime.metrics import read_metrics
from asymlift.stages.fit_basis import verdict_on
from asymlift.stages.inspection.data import inspect_data, is_data
from asymlift.stages.inspection.report import SHOWN, Inspection, brief, some_of
from asymlift.stages.inspection.single_file import portability_of
from asymlift.stages.locate import base_shift_of, distillation_of, family_in, geometry_of

KNOWN = (
    "a recipe (.yaml), a basis or other tensors (.safetensors), a shard (.tar) or a folder of "
    "shards, a folder of pictures or a table of them (.jsonl, .csv, .parquet), a diffusers folder, "
    "a lifted folder, a checkpoint (step-N), a folder of samples, a run folder"
)
MEGAPIXEL = 1024  # the side at which time shifts are quoted


def inspect_path(path: Path, picture: Path | None = None) -> Inspection:
    """Say what a file or folder is; `picture` is where a contact sheet of training data goes."""
    if not path.exists():
        raise BadData(f"{path}: there is no such file or folder")
    found = _by_kind(path)
    if found is None and is_data(path):
        return inspect_data(path, picture)
    if found is None:
        raise BadData(f"{path}: unknown; known are {KNOWN}")
    if picture is not None:
        raise BadData(f"{path}: a {found.kind}; only shards, folders and tables have pictures")
    return found


def _by_kind(path: Path) -> Inspection | None:
    """What is no training data; None for that, and for what is unknown."""
    if path.name in INDEXES:
        return _base(path.parent)
    if path.is_file():
        readers: dict[str, Callable[[Path], Inspection]] = {
            ".yaml": _recipe,
            ".yml": _recipe,
            ".safetensors": _tensors,
        }
        return readers[path.suffix](path) if path.suffix in readers else None
    for mark, reader in (
        (lifted_folder.FACTS, _lifted),
        *((index, _base) for index in INDEXES),
        (checkpoint.STATE, _checkpoint),
        ("index.json", _samples),
    ):
        if (path / mark).is_file():
            try:
                return reader(path)
            except (KeyError, TypeError, AttributeError, ValueError) as error:
                # JSON whose parts are not what they are in our own files.
                reason = f"{type(error).__name__}: {error}"
                raise BadData(f"{path}: not as {mark} should be ({reason})") from error
    if any((path / part).exists() for part in RUN_PARTS):
        return _run(path)
    if (path / "config.json").is_file() and pipeline_index(path.parent):
        raise BadData(f"{path}: a component of the model in {path.parent}: give that folder")
    return None


# ---- files -------------------------------------------------------------------------------------


def _recipe(path: Path) -> Inspection:
    recipe = load_recipe(path)
    train, loss, use = recipe.finetune.train, recipe.finetune.loss, recipe.finetune
    adapters = None if train == "full" else train.lora
    trained = "everything"
    if train != "full":
        parts = [f"LoRA of rank {adapters.rank}"] if adapters else []
        trained = ", ".join([*parts, *train.modules])
    folder = recipe.run_folder
    done = [name for name, part in RUN_STAGES.items() if (folder / part).exists()]
    rows = [
        ("base", recipe.model.base),
        ("family", recipe.model.family),
        ("training data", some_of(recipe.data.train)),
        ("colour", f"{recipe.color.space}, mean {recipe.color.mean}, std {recipe.color.std}"),
        ("basis", f"{recipe.basis.method}, from {recipe.basis.images} images"),
        ("trains", trained),
        (
            "training",
            f"{use.steps} steps of {use.batch}, {loss.kind}, lr {use.optimizer.lr:g}, "
            f"ZeRO {use.zero.stage}, {use.precision}",
        ),
        ("run folder", f"{folder}: {', '.join(done) + ' done' if done else 'nothing done yet'}"),
    ]
    facts = {
        "recipe": json.loads(recipe.model_dump_json()),
        "run_folder": str(folder),
        "done": done,
    }
    return Inspection("recipe", recipe.name, rows, facts)


def _tensors(path: Path) -> Inspection:
    header = read_header(path)
    if any(name.startswith("proj_mat_p") for name in header.tensors):
        return _basis(path)
    names = list(header.tensors)
    rows = [
        ("tensors", f"{len(names)}: {some_of(names)}"),
        ("numbers", f"{_count(_numbers([header]))}, {_dtypes([header])}"),
        ("size", human_bytes(path.stat().st_size)),
    ]
    config = path.parent / "config.json"
    class_name = read_json(config).get("_class_name") if config.is_file() else None
    more_rows, can_be_ported = portability_of(header.tensors, class_name)
    rows += more_rows
    if class_name and pipeline_index(path.parent.parent):
        rows.append(("part of", f"the model in {path.parent.parent}: give that folder"))
    facts = {
        "can_be_ported": can_be_ported,
        "num_tensors": len(names),
        "num_parameters": _numbers([header]),
        "metadata": header.metadata,
        "tensors": {n: [i.dtype, list(i.shape)] for n, i in header.tensors.items()},
    }
    return Inspection("tensors", path.name, rows, facts)


def _basis(path: Path) -> Inspection:
    basis = load_basis(path)
    rows_of_a, rank = basis.A.shape
    facts = {
        "D": rows_of_a,
        "rank": rank,
        "scale": basis.s,
        **{k: v for k, v in vars(basis).items() if k not in ("A", "s", "color", "spectrum")},
        "color": basis.color and asdict(basis.color),
        "checksum": has_checksum(path),
    }
    rows = [
        ("subspace", f"rank {rank} of {rows_of_a}: patches of {basis.patch} pixels, {basis.order}"),
        ("scale", f"{basis.s:.6g}"),
        ("method", f"{basis.method or 'not said'}, {basis.num_images or 'unknown'} images"),
        ("family", basis.family or "not said"),
        ("colour", _color(basis.color) if basis.color else "not said"),
        ("fitted for VAE", brief(basis.vae_fingerprint or "not said")),
    ]
    rows += [(f"held-out {name}", f"{value:.4f}") for name, value in basis.alignment.items()]
    problems = []
    if basis.unknown:
        problems.append(f"it does not say {', '.join(basis.unknown)}: convert cannot check these")
    if "r2" in basis.alignment and verdict_on(basis.alignment["r2"]) != "good":
        problems.append(
            f"R2 is {basis.alignment['r2']:.3f}, {verdict_on(basis.alignment['r2'])}: a linear map "
            "finds little of these latents in pixels; the lifted model starts from poor pictures"
        )
    return Inspection("basis", path.name, rows, facts, problems)


# ---- models ------------------------------------------------------------------------------------


def _base(path: Path) -> Inspection:
    folder = DiffusersFolder(path)
    rows, facts, wrong = _components(folder)
    problems = list(wrong.values())
    try:
        family = family_in(folder, "auto")
        problems = [text for name, text in wrong.items() if name not in family.idle]
        geometry = geometry_of(folder, family)
        check_stored_maps(folder, family, geometry)
        more_rows, more_facts = _sizes(folder, family, geometry, None)
        rows, facts = rows + more_rows, facts | more_facts
        if poor := distillation_of(folder, family, path.name):
            rows.append(("poor start", poor))
            facts["poor_start"] = poor
    except UserError as error:
        problems.append(str(error))
    problems = list(dict.fromkeys(problems))
    facts["can_be_ported"] = not problems
    rows.append(("can be ported", "no" if problems else f"yes, as family {family.name}"))
    return Inspection("diffusers folder", _pipeline_name(folder), rows, facts, problems)


def _lifted(path: Path) -> Inspection:
    lifted, folder = read_lifted(path), DiffusersFolder(path)
    rows, facts, wrong = _components(folder)
    more_rows, more_facts = [("family", lifted.family)], {"family": lifted.family}
    if ":" not in lifted.family:  # code of one's own is not run to look at a model
        family = find_family(lifted.family, folder.model_index, folder.config("transformer"))
        more_rows, more_facts = _sizes(folder, family, lifted.geometry, lifted.s)
        wrong = {name: text for name, text in wrong.items() if name not in family.idle}
    rows += [*more_rows, ("scale", f"{lifted.s:.6g}"), ("colour", _color(lifted.color))]
    rows += [(f"made from {k.replace('_', ' ')}", brief(v)) for k, v in lifted.fingerprints.items()]
    for name, found in lifted.facts.get("verification", {}).items():
        rows.append((f"verified, {name}", _plain(found or "not run")))
    rows.append(("licence of the base", lifted.facts.get("base_license") or "not said"))
    facts |= more_facts | {"scale": lifted.s, "asymlift": lifted.facts}
    problems = list(wrong.values())
    return Inspection("lifted model", _pipeline_name(folder), rows, facts, problems)


def _pipeline_name(folder: DiffusersFolder) -> str:
    return str(folder.model_index.get("_class_name", folder.path.name))


def _components(
    folder: DiffusersFolder,
) -> tuple[list[tuple[str, str]], dict[str, Any], dict[str, str]]:
    """One row per component with weights, and what is wrong with which."""
    rows: list[tuple[str, str]] = []
    facts: dict[str, Any] = {"components": {}}
    problems = {}
    for name, class_name in folder.components.items():
        found: dict[str, Any] = {"class": class_name}
        facts["components"][name] = found
        said = class_name
        try:
            if "config.json" in {p.name for p in folder.folder(name).iterdir()}:
                headers = list(folder.headers(name).values())
                size = sum(path.stat().st_size for path in folder.weight_files(name))
                found |= {"num_parameters": _numbers(headers), "bytes": size}
                found["num_files"] = len(headers)
                said += f": {_count(_numbers(headers))} {_dtypes(headers)}, {human_bytes(size)}"
        except BadData as error:
            problems[name] = str(error)
        rows.append((name.replace("_", " "), said))
    return rows, facts, problems


def _sizes(
    folder: DiffusersFolder, family: Family, geometry: Geometry, s: float | None
) -> tuple[list[tuple[str, str]], dict[str, Any]]:
    p = geometry.pixel_patch
    tokens = (MEGAPIXEL // p) ** 2
    shift = base_shift_of(folder, family, tokens)
    shifts = f"{shift:.4g} in latents"
    if s is not None:
        shifts += f", {pixel_shift(shift, s):.4g} in pixels"
    rows = [
        ("family", family.name),
        (
            "tokens",
            f"{p} x {p} pixels: {geometry.D} numbers; {geometry.d} in latents "
            f"({geometry.channels} channels, {geometry.vae_factor} times smaller, "
            f"patches of {geometry.patch}): rank {geometry.d / geometry.D:.1%}",
        ),
        ("token order", f"{family.order_in} in, {family.order_out} out"),
        ("maps", f"{family.first} and {family.last}"),
        (f"time shift at {MEGAPIXEL} x {MEGAPIXEL}", shifts),
    ]
    facts = {
        "family": family.name,
        "geometry": asdict(geometry),
        "patch": p,
        "D": geometry.D,
        "d": geometry.d,
        "token_order": [family.order_in, family.order_out],
        "base_shift_1024": shift,
    }
    return rows, facts


# ---- what a run leaves behind --------------------------------------------------------------------


def _checkpoint(path: Path) -> Inspection:
    described = manifest.read_manifest(path)
    if described.kind != checkpoint.KIND:
        raise BadData(f"{path}: a {described.kind}, unknown here; known are {KNOWN}")
    state = read_json(path / checkpoint.STATE)
    files = {
        name: read_header(path / name)
        for name in (checkpoint.TRAINABLE, checkpoint.EMA, checkpoint.OPTIMIZER)
        if (path / name).is_file()
    }
    trained = files.get(checkpoint.TRAINABLE, Header({}, {}))
    lora = state.get("lora")
    adapters = {name: t for name, t in trained.tensors.items() if name.endswith((DOWN, UP))}
    whole = {name: t for name, t in trained.tensors.items() if name not in adapters}
    modules = sorted({name.rpartition(".")[0] for name in whole})
    size = sum(size for size, _ in described.files.values())
    rows = [
        ("step", f"{state.get('step')}, {state.get('samples', 'unknown')} samples seen"),
        ("trained whole", f"{_count(_numbers([Header(whole, {})]))} numbers: {some_of(modules)}"),
        ("trained by LoRA", _adapters(adapters, lora)),
        ("average", "kept" if checkpoint.EMA in files else "none"),
        ("size", f"{human_bytes(size)} in {len(described.files)} files"),
    ]
    rows += [(f"trained from {k}", brief(v)) for k, v in state.get("fingerprints", {}).items()]
    facts = {
        "step": state.get("step"),
        "num_trained": _numbers([trained]),
        "num_adapted": _numbers([Header(adapters, {})]),
        "modules": modules,
        "has_ema": checkpoint.EMA in files,
        "bytes": size,
        "state": {key: value for key, value in state.items() if key != "parameters"},
    }
    present = set(manifest.list_files(path))
    problems = [f"{name}: missing" for name in sorted(set(described.files) - present)]
    return Inspection("checkpoint", f"step {state.get('step')}", rows, facts, problems)


def _adapters(tensors: Mapping[str, TensorInfo], lora: Mapping[str, Any] | None) -> str:
    if not lora:
        return "nothing"
    return (
        f"{_count(_numbers([Header(dict(tensors), {})]))} numbers: {len(tensors) // 2} x "
        f"rank {lora['rank']}, alpha {lora['alpha']:g}"
    )


def _samples(path: Path) -> Inspection:
    index = read_json(path / "index.json")
    pictures = index.get("pictures", [])
    missing = [p["file"] for p in pictures if not (path / p["file"]).is_file()]
    facts = index.get("facts", index)
    weights = Counter(p["weights"] for p in pictures)
    rows = [("pictures", f"{len(pictures)}" if pictures else f"{len(list(path.glob('*.png')))}")]
    if weights:
        rows.append(("weights", ", ".join(f"{k} ({count})" for k, count in weights.items())))
    rows += [
        (key.replace("_", " "), _plain(value)) for key, value in facts.items() if key != "weights"
    ]
    problems = [f"{name}: missing" for name in missing[:SHOWN]]
    if index.get("complete") is False:
        problems.append("not finished: the same `asymlift sample` goes on with it")
    return Inspection("samples", path.name, rows, index, problems)


RUN_STAGES = {  # stage -> what it leaves
    "fit-basis": "basis.safetensors",
    "convert": "lifted",
    "finetune": "checkpoints",
    "sample": "samples",
}
RUN_PARTS = (*RUN_STAGES.values(), "metrics.jsonl", "run.json")


def _run(path: Path) -> Inspection:
    rows: list[tuple[str, str]] = []
    facts: dict[str, Any] = {"parts": {}}
    problems = []
    for part in ("basis.safetensors", "lifted"):
        if not (path / part).exists():
            rows.append((part, "not there yet"))
            continue
        try:
            found = inspect_path(path / part)
        except BadData as error:
            problems.append(str(error))
            continue
        facts["parts"][part] = found.facts
        chosen = ("subspace", "scale", "held-out r2", "family", "colour")
        rows.append((part, "; ".join(v for k, v in found.rows if k in chosen)))
        problems += [f"{part}: {problem}" for problem in found.problems]
    steps = checkpoint.steps_on_disk(path / "checkpoints")
    facts["checkpoints"] = sorted(steps)
    rows.append(("checkpoints", some_of(f"step {step}" for step in steps) or "none yet"))
    lines = read_metrics(path / "metrics.jsonl") if (path / "metrics.jsonl").is_file() else []
    if lines:
        facts["last"] = lines[-1]
        said = (f"{key} {value:g}" for key, value in lines[-1].items() if key in SAID_OF_A_STEP)
        rows.append(("last step", ", ".join(said)))
    samples = sorted(p.parent.name for p in path.glob("samples/*/index.json"))
    if samples:
        rows.append(("samples", some_of(samples)))
    facts["samples"] = samples
    return Inspection("run", path.name, rows, facts, problems)


SAID_OF_A_STEP = ("step", "loss", "grad_norm", "lr", "samples", "bad_samples")


# ---- words ---------------------------------------------------------------------------------------


def _numbers(headers: Iterable[Header]) -> int:
    return sum(math.prod(info.shape) for header in headers for info in header.tensors.values())


def _dtypes(headers: Iterable[Header]) -> str:
    """Most numbers first: 'BF16, F32'."""
    found = Counter[str]()
    for header in headers:
        for info in header.tensors.values():
            found[info.dtype] += math.prod(info.shape)
    return ", ".join(name for name, _ in found.most_common())


def _count(number: int) -> str:
    """1234567 -> '1.23 M'."""
    for unit, name in ((1e9, " B"), (1e6, " M"), (1e3, " k")):
        if number >= unit:
            return f"{number / unit:.3g}{name}"
    return str(number)


def _color(color: Any) -> str:
    mean = ", ".join(f"{value:g}" for value in color.mean)
    return f"{color.space}, mean ({mean}), std {color.std:g}"


def _plain(value: Any) -> str:
    if isinstance(value, Mapping):
        return ", ".join(f"{key} {brief(str(inner))}" for key, inner in value.items())
    return some_of(map(str, value)) if isinstance(value, list) else str(value)
