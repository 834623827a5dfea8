"""Base model and basis -> lifted/: the same pipeline, its transformer reading pixel tokens.

Two maps change, and two of the second network that some families guide against; everything else
keeps its bytes. Weights without a map are hard links; configs, tokenizers and papers are copies, so
that they can be edited. The new folder is built beside its target and renamed when it has been
verified.
"""

import dataclasses
import functools
import re
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import safetensors
import torch

from asymlift import __version__
from asymlift.artifacts import lifted_folder
from asymlift.artifacts.basis_file import Basis, load_basis
from asymlift.artifacts.diffusers_folder import INDEXES, PICKLES, DiffusersFolder, read_json
from asymlift.artifacts.files import free_bytes, human_bytes, sha256_file
from asymlift.artifacts.lifted_weights import LiftedWeights
from asymlift.artifacts.manifest import check_manifest, digest_json, list_files, read_manifest
from asymlift.artifacts.staging import StagedFolder, is_shared, staged_folder
from asymlift.errors import BadData, CannotWrite, Unavailable
from asymlift.families.base import TRANSFORMER, Family, Geometry
from asymlift.maths.color import ColorCode
from asymlift.runtime.log import progress
from asymlift.stages.locate import geometry_of
from asymlift.stages.self_check import (
    Conditioning,
    Coupling,
    Maps,
    check_coupling,
    check_maps,
    why_not_coupled,
)

PAPERS = re.compile(r"readme|licen[cs]e|notice|copying|use_policy", re.IGNORECASE)
SLACK = 1 << 20  # for configs, the manifest and what the file system needs


@dataclass(frozen=True)
class ConvertPlan:
    """What to convert, and into what."""

    base: Path  # a diffusers pipeline folder
    basis: Path
    output: Path
    family: Family
    family_name: str = ""  # as the recipe names it, where that is module:NAME
    color: ColorCode | None = None  # needed only for a basis that does not say
    verify: Literal["auto", "maps", "full"] = "auto"
    text_length: int | None = None  # tokens per prompt in the full check; None: the pipeline's own
    conditioning: Conditioning | None = None  # for the full check, where no encoders are
    overwrite: bool = False


@dataclass(frozen=True)
class ConvertReport:
    """What convert did, and how exact the result is."""

    path: Path
    rank: int
    patch: int
    scale: float
    license: str | None  # of the base model, as its README states it
    notes: list[str]
    already_done: bool = False
    linked: int = 0  # files that cost no space
    written: int = 0  # weight files that changed
    resumed: int = 0  # of these, finished by an earlier run
    maps: Maps | None = None
    coupling: Coupling | None = None
    seconds: float = 0.0


@dataclass(frozen=True)
class Source:
    """All that was read and checked before the first byte is written."""

    base: DiffusersFolder
    basis: Basis
    geometry: Geometry
    color: ColorCode
    networks: tuple[LiftedWeights, ...]
    carried: dict[str, Path]  # every file of the other parts, by its relative path
    indexes: dict[str, bytes]  # of these, what is not taken over as it is
    basis_sha256: str
    notes: list[str]

    @property
    def components(self) -> list[str]:
        """The networks by their names in the pipeline."""
        return [network.component for network in self.networks]

    @property
    def files(self) -> list[Path]:
        """All files of the base that matter."""
        weights = [path for network in self.networks for path in network.headers]
        return [*weights, *self.carried.values()]

    def fingerprints(self) -> dict[str, str]:
        """What the result is made from. Waits until every file has been hashed."""
        base = self.base
        return {
            **{
                f"{lifted_folder.OF_BASE}{network.component}": base.fingerprint(network.component)
                for network in self.networks
            },
            "vae": base.fingerprint("vae"),
            "basis": f"sha256:{self.basis_sha256}",
            "base": digest_json({name: base.sha256(path) for name, path in self.carried.items()}),
        }


def convert(plan: ConvertPlan) -> ConvertReport:
    """Convert. Run again, it goes on after a kill, or says that it is done."""
    started = time.monotonic()
    output = plan.output.resolve()
    with staged_folder(output, f"{plan.output}") as staged:
        source = read_source(plan)
        report = ConvertReport(
            path=plan.output,
            rank=source.geometry.d,
            patch=source.geometry.pixel_patch,
            scale=source.basis.s,
            license=source.base.license,
            notes=source.notes,
        )
        with source.base.hashing_ahead(source.files):  # takes as long as writing: do both at once
            if output.exists() and _is_done(plan, output, _identity(plan, source)):
                staged.clear()
                report = _already_done(plan, source, output, report)
            else:
                if not staged.begin(_quick_identity(plan, source)):
                    lost = f"{staged.work}: an unfinished conversion of something else, discarded"
                    source.notes.append(lost)
                report = _build(plan, source, staged, report)
                staged.commit(kind=lifted_folder.KIND, facts=_identity(plan, source))
    return dataclasses.replace(report, seconds=time.monotonic() - started)


def read_source(plan: ConvertPlan) -> Source:
    """Read and check everything that goes in; writes nothing."""
    base, family = DiffusersFolder(plan.base), plan.family
    notes: list[str] = []
    if (base.path / lifted_folder.FACTS).exists():
        raise BadData(f"{plan.base}: is lifted already; give the latent model it was made from.")
    _check_class(base, family, TRANSFORMER)
    geometry = geometry_of(base, family)
    components = _networks(base, family, notes)
    basis = load_basis(plan.basis, geometry.pixel_patch)
    if basis.unknown:
        notes.append(f"{plan.basis}: does not say {', '.join(basis.unknown)}; not checked")
    return Source(
        base=base,
        basis=basis,
        geometry=geometry,
        color=_check_basis(plan, basis, geometry, base),
        networks=tuple(
            LiftedWeights.of(base, family, geometry, basis.A, component) for component in components
        ),
        carried=_carried_files(base, family, components, notes),
        indexes=base.own_indexes(),
        basis_sha256=sha256_file(plan.basis),
        notes=notes,
    )


def _check_class(base: DiffusersFolder, family: Family, component: str) -> None:
    found = base.config(component).get("_class_name", base.components.get(component))
    if found != family.transformer.rpartition(":")[2]:
        raise BadData(
            f"{base.path}: its {component} is a {found}, but family {family.name} is for "
            f"{family.transformer}. Choose another family, or `auto`."
        )


def _networks(base: DiffusersFolder, family: Family, notes: list[str]) -> list[str]:
    """The components to lift. Without the wordless network a base can be ported all the same."""
    second = family.wordless
    if second is None:
        return [TRANSFORMER]
    if not base.has(second):
        notes.append(
            f"{base.path}: there is no {second}/, so guidance will go against the empty prompt, "
            "and the pipeline of diffusers will not run the lifted model"
        )
        return [TRANSFORMER]
    _check_class(base, family, second)
    first, other = (base.config(component) for component in (TRANSFORMER, second))
    if any(first.get(key) != other.get(key) for key in family.channels(1)):
        raise BadData(
            f"{base.path}: {TRANSFORMER} and {second} do not read the same latents. Take both from "
            "one model."
        )
    return [TRANSFORMER, second]


def _check_basis(
    plan: ConvertPlan, basis: Basis, geometry: Geometry, base: DiffusersFolder
) -> ColorCode:
    """Refuse a basis that belongs to another model; return the colour space that it is for."""
    if basis.A.shape[1] != geometry.d:
        raise BadData(
            f"{plan.basis}: has rank {basis.A.shape[1]}, but a latent token of {plan.base} has "
            f"{geometry.d} numbers. Fit a basis for this model."
        )
    if basis.family not in (None, plan.family.name):
        raise BadData(
            f"{plan.basis}: was fitted for family {basis.family}, but {plan.base} is "
            f"{plan.family.name}. Fit a basis for this model."
        )
    if basis.order != "c p q":
        raise BadData(f"{plan.basis}: its tokens are in order {basis.order!r}, not 'c p q'.")
    if basis.vae_fingerprint not in (None, base.fingerprint("vae")):
        raise BadData(
            f"{plan.basis}: was fitted with another VAE\n({basis.vae_fingerprint}) than that of "
            f"{plan.base}\n({base.fingerprint('vae')}). Fit a basis for this model."
        )
    color = basis.color or plan.color
    if color is None:
        raise BadData(
            f"{plan.basis}: does not say in which colour space it was fitted. Give `color` in "
            "the recipe as numbers (published: oklab, mean [0.56, 0.0, 0.01], std 0.16)."
        )
    if plan.color not in (None, color):
        raise BadData(f"{plan.basis}: was fitted in {color}, the recipe says {plan.color}.")
    return color


def _carried_files(
    base: DiffusersFolder, family: Family, networks: Sequence[str], notes: list[str]
) -> dict[str, Path]:
    """Every file that is taken over; what is left behind is noted."""
    carried = {
        path.name: base.own(path)
        for path in sorted(base.path.iterdir())
        if path.is_file() and (path.name in INDEXES or PAPERS.match(path.name))
    }
    for component in sorted(set(base.components) - set(family.networks)):
        folder = base.path / component
        if not folder.is_dir():
            notes.append(f"{folder}: named in {base.index.name}, but not there")
            continue
        files = base.files(component)
        pickles = [name for name in files if Path(name).suffix in PICKLES]
        if pickles and not any(name.endswith(".safetensors") for name in files):
            base.weight_files(component)  # says what to do about them
        if pickles:
            notes.append(f"{folder}: pickles are left out ({', '.join(pickles)})")
        carried |= {f"{component}/{n}": path for n, path in files.items() if n not in pickles}
    for network in networks:
        index = base.index_path(network)
        known = {path.name for path in [*base.weight_files(network), *([index] if index else [])]}
        others = set(list_files(base.folder(network))) - known - {"config.json"}
        if others:
            notes.append(f"{base.folder(network)}: left out ({', '.join(sorted(others))})")
    return carried


def _identity(plan: ConvertPlan, source: Source) -> dict[str, Any]:
    """What makes two conversions the same, whichever version of asymlift runs them."""
    return {
        "family": plan.family_name or plan.family.name,
        "color": dataclasses.asdict(source.color) | {"mean": list(source.color.mean)},
        "fingerprints": source.fingerprints(),
    }


def _quick_identity(plan: ConvertPlan, source: Source) -> str:
    """What an unfinished conversion is of, without reading the base: each weight file that was
    finished knows the sha256 of its origin besides.
    """
    stats = [(str(path.relative_to(plan.base)), path.stat()) for path in source.files]
    return digest_json(
        {
            "asymlift": __version__,
            "family": plan.family_name or plan.family.name,
            "color": dataclasses.asdict(source.color),
            "basis": source.basis_sha256,
            "base": [[name, stat.st_size, stat.st_mtime_ns] for name, stat in stats],
        }
    )


def _is_done(plan: ConvertPlan, output: Path, identity: dict[str, Any]) -> bool:
    """Whether the target is this conversion, whole. What must not be replaced is refused."""
    if output.is_dir() and not any(output.iterdir()):
        return False
    if not (output / lifted_folder.FACTS).exists():
        raise CannotWrite(
            f"{plan.output}: exists, and was not made by `asymlift convert`. "
            "Move it away, or choose another folder."
        )
    try:
        found = read_manifest(output).facts
        problems = check_manifest(output) if found == identity else []
    except BadData as error:
        found, problems = {}, [str(error)]
    if found == identity and not problems:
        return True
    if plan.overwrite:
        return False
    if problems:
        raise CannotWrite(
            f"{plan.output}: exists but is damaged ({problems[0]}). "
            "Use --overwrite to make it again."
        )
    raise CannotWrite(
        f"{plan.output}: holds another conversion ({_difference(found, identity)}). "
        "Use --overwrite to replace it, or choose another folder."
    )


def _difference(found: dict[str, Any], wanted: dict[str, Any]) -> str:
    old, new = ({**facts, **facts["fingerprints"]} for facts in (found, wanted))
    keys = [key for key in new if old.get(key) != new[key] and key != "fingerprints"]
    return "; ".join(f"{key} {_short(old.get(key))}, now {_short(new[key])}" for key in keys)


def _short(value: object) -> str:
    text = str(value)
    return text[:15] + "..." if text.startswith("sha256:") else text


def _already_done(
    plan: ConvertPlan, source: Source, output: Path, report: ConvertReport
) -> ConvertReport:
    checks = read_json(output / lifted_folder.FACTS)["verification"]
    coupling = Coupling(**checks["coupling"]) if checks["coupling"] else None
    if plan.verify == "full" and coupling is None:
        coupling = _coupling(plan, source, output)
    return dataclasses.replace(
        report, already_done=True, maps=Maps(**checks["maps"]), coupling=coupling
    )


def _build(
    plan: ConvertPlan, source: Source, staged: StagedFolder, report: ConvertReport
) -> ConvertReport:
    """Fill the staged folder and verify it."""
    linked = written = resumed = 0
    _check_space(plan, source, staged)
    carried = {k: path for k, path in source.carried.items() if k not in source.indexes}
    with progress("convert: files", len(source.files)) as ticker:
        for network, path in _weight_files(source):
            name = f"{network.component}/{path.name}"
            if network.is_changed(path):
                origin = functools.partial(source.base.sha256, path)
                written += 1
                resumed += not staged.make(name, network.writer_of(path), origin)
                ticker.tick(note=name)
            else:
                carried[name] = path
        for name, path in carried.items():
            linked += staged.take(name, path, functools.partial(source.base.sha256, path))
            ticker.tick(note=name)
    for name, data in source.indexes.items():
        staged.write(name, data)
    for network in source.networks:
        staged.write(f"{network.component}/config.json", network.config())
        if index := network.index():
            staged.write(f"{network.component}/{index[0]}", index[1])
        network.check(staged.new)
    try:
        maps, coupling = _verify(plan, source, staged.new)
    except BadData:
        staged.discard()
        raise
    lifted_folder.write_lifted_facts(
        staged.new,
        family=plan.family_name or plan.family.name,
        networks=source.components,
        geometry=source.geometry,
        A=source.basis.A,
        s=source.basis.s,
        color=source.color,
        fingerprints=source.fingerprints(),
        more=_more_facts(source, maps, coupling),
    )
    for name in (lifted_folder.FACTS, lifted_folder.TENSORS):
        staged.sha256[name] = sha256_file(staged.new / name)
    return dataclasses.replace(
        report, linked=linked, written=written, resumed=resumed, maps=maps, coupling=coupling
    )


def _weight_files(source: Source) -> Iterator[tuple[LiftedWeights, Path]]:
    for network in source.networks:
        for path in network.headers:
            yield network, path


def _check_space(plan: ConvertPlan, source: Source, staged: StagedFolder) -> None:
    """Refuse before the first byte, not in the middle."""
    can_link = staged.can_link(source.base.index)

    def taken_over(path: Path) -> int:
        return 0 if can_link and is_shared(path) else path.stat().st_size

    sizes = {name: taken_over(path) for name, path in source.carried.items()}
    for network, path in _weight_files(source):
        changed = network.is_changed(path)
        size = network.num_bytes(path) if changed else taken_over(path)
        sizes[f"{network.component}/{path.name}"] = size
    # What is there is from an earlier run; if it is to be made again, its space is free first.
    needed = SLACK + sum(size for name, size in sizes.items() if not (staged.new / name).exists())
    free = free_bytes(staged.work)
    if free < needed:
        raise CannotWrite(
            f"{plan.output}: needs {human_bytes(needed)}, but only {human_bytes(free)} are free "
            "here. Free some space, or choose another folder."
        )


def _verify(plan: ConvertPlan, source: Source, folder: Path) -> tuple[Maps, Coupling | None]:
    """Always the maps; the whole model where that is asked for, or possible."""
    maps = check_maps(
        source.base,
        DiffusersFolder(folder),
        plan.family,
        source.geometry,
        source.basis.A,
        source.components,
    )
    if plan.verify == "maps":
        return maps, None
    if plan.verify == "full":
        return maps, _coupling(plan, source, folder)
    reason = why_not_coupled(source.base, plan.family, plan.conditioning, source.components)
    try:
        if reason is None:
            return maps, _coupling(plan, source, folder)
    except Unavailable as error:  # a package, or an encoder that the folder comes without
        reason = str(error)
    source.notes.append(f"verified only the two maps: {reason}")
    return maps, None


def _coupling(plan: ConvertPlan, source: Source, folder: Path) -> Coupling:
    return check_coupling(
        source.base,
        folder,
        plan.family,
        source.geometry,
        source.basis.A,
        source.basis.s,
        components=source.components,
        conditioning=plan.conditioning,
        text_length=plan.text_length,
    )


def _more_facts(source: Source, maps: Maps, coupling: Coupling | None) -> dict[str, Any]:
    basis = source.basis
    return {
        "basis": {
            "method": basis.method,
            "num_images": basis.num_images,
            "alignment": basis.alignment,
            "scale": basis.s,
        },
        "base_license": source.base.license,
        "verification": {
            "maps": dataclasses.asdict(maps),
            "coupling": coupling and dataclasses.asdict(coupling),
        },
        "versions": {
            "asymlift": __version__,
            "torch": torch.__version__,
            "safetensors": safetensors.__version__,
        },
    }
