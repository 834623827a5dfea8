"""fit-basis: images and their latents in, a pixel subspace out.

    catalog -> the lowest key hashes -> chunks of moments -> merged -> basis.safetensors + a page

Which images serve depends on nothing but their keys, so the order of shards changes nothing.

D pixel token width, d latent token width, p pixel patch.
"""

import hashlib
import json
import math
import os
import re
import shutil
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

import asymlift
from asymlift.artifacts.basis_file import Basis, load_basis, save_basis
from asymlift.artifacts.diffusers_folder import DiffusersFolder
from asymlift.artifacts.files import exclusive_lock, write_bytes_atomically, writing
from asymlift.data.catalog import Catalog, Listed
from asymlift.data.pairs import PairReader
from asymlift.data.records import LATENT, BadSample, Part, Record
from asymlift.data.table import Table
from asymlift.errors import BadData, CannotWrite
from asymlift.families.base import Family, Geometry
from asymlift.maths.basis import (
    alignment,
    column_energy,
    least_squares_scale,
    norm_matched_scale,
    pca,
    procrustes,
    random_basis,
    rotate_to_latents,
)
from asymlift.maths.color import ColorCode
from asymlift.maths.moments import Moments, color_statistics, normalised
from asymlift.recipe import CaptionSection, DataSection
from asymlift.report.basis_report import (
    BasisReport,
    Comparison,
    HeldOutPictures,
    Verdict,
    basis_page,
    renderings,
)
from asymlift.runtime.log import warn
from asymlift.stages.basis_statistics import Statistics, Stop, check_budget, cut, reasons
from asymlift.stages.open_data import check_origin, open_data, tell_what_is_left_out

GOOD_R2, MARGINAL_R2 = 0.5, 0.0  # provisional: no large port has been measured against them yet
RE_ENCODED = 4  # cached latents that are compared with the VAE's
MOST_DISAGREEMENT = 0.25  # of their energy; seen: 0.002 for the same image, 1.1 for another
ROUNDING = 1e-12  # of sums in float64, as a share of them
PICTURES = 4
FIRST_CHUNK = 8  # images; convergence is read there and at every power of two above
FORMAT = 1  # of the statistics; changes with what a chunk holds


@dataclass(frozen=True)
class FitPlan:
    """Everything the result depends on, and where it goes."""

    data: DataSection  # without validation data some of train are held out
    family: Family
    geometry: Geometry
    out: Path
    base: Path | None = None  # a diffusers folder; its VAE encodes and checks
    space: Literal["rgb", "oklab"] = "oklab"
    mean: tuple[float, float, float] | Literal["fit"] = (0.56, 0.0, 0.01)
    std: float | Literal["fit"] = 0.16
    method: Literal["procrustes", "pca"] = "procrustes"
    images: int = 1000
    holdout: int = 200
    tokens_per_image: int | None = None
    accept_poor_fit: bool = False
    keep_statistics: bool = False
    overwrite: bool = False  # a basis that is there
    device: str = "cpu"
    rank: int = 0
    world: int = 1


def fit_basis(plan: FitPlan, *, stop: Stop = lambda: False) -> BasisReport | None:
    """Fit, judge and write a basis; None on ranks above 0, which may leave before it is written.

    Running it again goes on where it was stopped, or finds the work done.
    """
    with writing(plan.out):
        plan.out.mkdir(parents=True, exist_ok=True)
    job = Job(plan)
    done = finished(plan, job)
    if done is not None:
        return done if plan.rank == 0 else None
    if plan.rank > 0:
        job.statistics.make_share(stop)
        return None
    with exclusive_lock(plan.out / ".fit-basis.lock", f"the basis in {plan.out}"):
        disagreement = check_pairing(job.pairs, job.foreign)
        job.statistics.make_share(stop)
        job.statistics.wait_for_others(stop)
        return conclude(plan, job, disagreement)


# ---- which images, and how they are read -----------------------------------------------------


class Autoencoder:
    """The base's VAE, loaded when it is first needed."""

    def __init__(self, base: DiffusersFolder, family: Family, device: str) -> None:
        self.folder, self.family, self.device = base.path, family, device
        self.fingerprint = base.fingerprint("vae")

    @cached_property
    def vae(self) -> Any:
        from asymlift.model.loading import load_pipeline_parts

        vae = load_pipeline_parts(
            self.folder, ["vae"], library=self.family.library, dtype=torch.float32
        )["vae"]
        return vae.requires_grad_(False).to(self.device)

    @torch.inference_mode()
    def encode(self, image: Tensor) -> Tensor:
        return self.family.encode_latents(self.vae, image.to(self.device)).float().cpu()

    @torch.inference_mode()
    def decode(self, z: Tensor) -> Tensor:
        return self.family.decode_latents(self.vae, z.float().to(self.device)).float().cpu()


class Job:
    """A plan with its images chosen and everything opened that reads them."""

    def __init__(self, plan: FitPlan) -> None:
        self.autoencoder = autoencoder_of(plan)
        catalogs = opened(plan, self.autoencoder)
        self.faults = [fault for catalog in catalogs for fault in catalog.faults]
        num_listed = sum(catalog.num_listed for catalog in catalogs)
        check_budget(self.faults, num_listed, plan.data.max_bad_fraction)
        fit, judge = choose(plan, *catalogs)
        self.fit, self.judge = cut("fit", fit, smallest=FIRST_CHUNK), cut("judge", judge)
        self.samples = [*fit, *judge]

        sources = [source for catalog in catalogs for source in catalog.sources]
        self.folders = [source for source in sources if isinstance(source, Listed)]
        self.shards = {source.path: source for source in sources if isinstance(source, Table)}
        cached = [record for record in self.samples if LATENT in record.parts]
        self.foreign = [record for record in cached if not self.is_prepared(record)]
        self.num_encoded = len(self.samples) - len(cached) if self.autoencoder else 0
        self.pairs = PairReader(
            plan.space,
            plan.geometry,
            tokens_per_image=plan.tokens_per_image,
            encode=self.autoencoder.encode if self.autoencoder else None,
            device=plan.device,
        )
        self.data_fingerprint = self.fingerprint_of_data(plan)
        settings = [plan.family.name, plan.method, plan.mean, plan.std]
        self.fingerprint = digest([self.data_fingerprint, *settings])
        self.statistics = Statistics(
            plan.out / "basis-statistics" / self.data_fingerprint,
            [*self.fit, *self.judge],
            self.pairs,
            plan.geometry,
            max_bad_fraction=plan.data.max_bad_fraction,
            workers=plan.data.workers,
            device=plan.device,
            rank=plan.rank,
            world=plan.world,
        )

    def shard_of(self, part: Part) -> Table | None:
        """None for a picture of a folder or a table."""
        return None if part.path is None else self.shards.get(part.path)

    def is_prepared(self, record: Record) -> bool:
        """Whether the shard of its latent names the VAE, which then has been compared."""
        shard = self.shard_of(record.parts[LATENT])
        return shard is not None and "vae" in (shard.made or {})

    def fingerprint_of_data(self, plan: FitPlan) -> str:
        """Of all that the moments depend on; folders do not count, so a copy is the same data."""
        encoder = self.autoencoder.fingerprint if self.autoencoder and self.num_encoded else None
        samples = [
            [record.key, record.target, *map(self.version_of, parts_read(record))]
            for record in self.samples
        ]
        return digest(
            [
                [FORMAT, plan.space, plan.tokens_per_image, asdict(plan.geometry), encoder],
                [chunk.name for chunk in [*self.fit, *self.judge]],
                sorted(version_of_shard(shard) for shard in self.shards_read()),
                samples,
            ]
        )

    def version_of(self, part: Part) -> list[Any]:
        """The shard's name; size and time of a file; what the bytes are that a table holds."""
        shard = self.shard_of(part)
        if shard is not None:
            return [shard.path.name]
        if part.path is None:
            return [hashlib.sha256(part.inline or b"").hexdigest()]
        return [part.size, part.path.stat().st_mtime_ns]

    def shards_read(self) -> list[Table]:
        parts = [part for record in self.samples for part in parts_read(record)]
        found = {shard.path: shard for part in parts if (shard := self.shard_of(part))}
        return list(found.values())

    def sources(self) -> list[str]:
        """The names, without their folders, of what the images come from."""
        paths = [shard.path for shard in self.shards_read()]
        paths += [folder.path for folder in self.folders]
        return sorted({path.absolute().name for path in paths})


def parts_read(record: Record) -> list[Part]:
    """The image and the cached latent."""
    read = (record.image_suffix, LATENT)
    return [part for suffix, part in record.parts.items() if suffix in read]


def version_of_shard(shard: Table) -> list[Any]:
    """Name, size, and the sha256 where the index knows it, else the time."""
    known = shard.facts.get("sha256") or str(shard.facts["mtime"])
    return [shard.path.name, shard.path.stat().st_size, known]


def autoencoder_of(plan: FitPlan) -> Autoencoder | None:
    base = DiffusersFolder(plan.base) if plan.base else None
    if base is None or "vae" not in base.components:
        return None
    return Autoencoder(base, plan.family, plan.device)


def opened(plan: FitPlan, autoencoder: Autoencoder | None) -> list[Catalog]:
    """What fits, and what judges where that is named; made with this model or by no `prepare`."""
    # Captions and labels play no part here, so nothing is left out for want of them.
    data = plan.data.model_copy(update={"caption": CaptionSection()})
    wanted = {"family": plan.family.name}
    if autoencoder is not None:
        wanted["vae"] = autoencoder.fingerprint
    catalogs = []
    for patterns in (data.train, data.validation):
        if patterns is not None:
            catalog = open_data(patterns, data, plan.geometry.pixel_patch)
            check_origin(catalog.made, wanted, data, str(patterns))
            if plan.rank == 0:
                tell_what_is_left_out(catalog)
            catalogs.append(catalog)
    return catalogs


def choose(
    plan: FitPlan, train: Catalog, validation: Catalog | None = None
) -> tuple[list[Record], list[Record]]:
    """(images that fit, images that judge): the lowest hashes of their keys."""
    total = len(train)
    if validation is not None:
        total += len(validation)
        fit = train.lowest_hashes(plan.images)
        judge = validation.lowest_hashes(plan.holdout)
    else:
        wanted, held = plan.images + plan.holdout, plan.holdout
        if total < wanted:
            held = max(1, total * plan.holdout // wanted)
            warn(f"{total} images where {wanted} are asked for: {held} of them only judge")
        chosen = train.lowest_hashes(wanted)
        fit = chosen[: min(plan.images, total - held)]
        judge = chosen[len(fit) : len(fit) + held]
    if not fit or not judge:
        raise BadData(
            f"{plan.data.train}: {total} usable images are too few: at least one must fit the "
            "basis and another judge it"
        )
    return fit, judge


def finished(plan: FitPlan, job: Job) -> BasisReport | None:
    """The report of a basis that this plan has already made."""
    path = plan.out / "basis.safetensors"
    if plan.overwrite or not path.exists():
        return None
    facts = load_basis(path).facts
    if facts.get("fingerprint") != job.fingerprint:
        raise CannotWrite(
            f"{path}: a basis made with other settings or from other data is already here. "
            "--overwrite replaces it; another run name keeps both."
        )
    return BasisReport.from_facts(facts["report"], path, plan.out / "basis-report.html")


def check_pairing(pairs: PairReader, cached: Sequence[Record]) -> float | None:
    """Compare cached latents with what the VAE makes of their images; None if it cannot.

    A cache of other images has the right shapes and would spoil everything in silence.
    """
    found: dict[str, float] = {}
    for record in cached if pairs.encode else []:
        try:
            found[record.where] = pairs.disagreement(record)
        except BadSample:
            continue  # counted when its chunk is made
        if len(found) == RE_ENCODED:
            break
    if not found:
        return None
    worst = max(found, key=lambda where: found[where])
    if not found[worst] <= MOST_DISAGREEMENT:
        several = sum(not value <= MOST_DISAGREEMENT for value in found.values())
        raise BadData(
            f"{worst}: the cached latent differs from what the base's VAE makes of the image by "
            f"{found[worst]:.2f} of its energy; {several} of {len(found)} differ by more than "
            f"{MOST_DISAGREEMENT} (the same image gives below 0.05).\n"
            "The latents belong to other images, another VAE or another normalisation: make the "
            "cache again."
        )
    return found[worst]


def digest(facts: Any) -> str:
    return hashlib.sha256(json.dumps(facts).encode()).hexdigest()[:16]


# ---- from moments to a basis -----------------------------------------------------------------


def conclude(plan: FitPlan, job: Job, disagreement: float | None) -> BasisReport:
    """Fit on the merged moments, judge on the held-out ones, write the page and then the basis."""
    raw_fit, bad_fit = job.statistics.total(job.fit)
    raw_judge, bad_judge = job.statistics.total(job.judge)
    check_budget([*bad_fit, *bad_judge], len(job.samples), plan.data.max_bad_fraction)
    check_moments(plan, raw_fit, raw_judge)
    faults = [*job.faults, *bad_fit, *bad_judge]

    patch, d = plan.geometry.pixel_patch, plan.geometry.d
    own = color_statistics(raw_fit, patch)
    mean = own[0] if plan.mean == "fit" else plan.mean
    color = ColorCode(plan.space, mean, own[1] if plan.std == "fit" else plan.std)
    fit, judge = (normalised(m, color.mean, color.std, patch) for m in (raw_fit, raw_judge))
    for raw, moments, purpose in ((raw_fit, fit, "fit"), (raw_judge, judge, "judge")):
        if is_of_one_color(moments, raw, color.std):
            raise BadData(
                f"{plan.data.train}: all {raw.num_images} images that {purpose} the basis are of "
                "one colour, the mean that is taken off; give other images"
            )
    A, spectrum = solve(plan.method, fit)
    s = norm_matched_scale(A, fit)
    score = alignment(A, s, judge)
    report = BasisReport(
        path=plan.out / "basis.safetensors",
        page=plan.out / "basis-report.html",
        verdict=verdict_on(score.r2),
        method=plan.method,
        family=plan.family.name,
        patch=patch,
        rank=d,
        s=s,
        color=color,
        color_fitted="fit" in (plan.mean, plan.std),
        score=score,
        num_images=fit.num_images,
        num_tokens=fit.num_tokens,
        num_judges=judge.num_images,
        judges="validation data" if plan.data.validation is not None else "held out of training",
        comparisons=[
            *compare(plan, A, s, fit, judge),
            *compare_colors(plan, raw_fit, raw_judge),
        ],
        convergence=converge(plan, job, color, judge),
        spectrum=spectrum.tolist(),
        column_energy=column_energy(A, judge).tolist(),
        pca_energy=column_energy(pca(fit, d)[0], judge).tolist(),
        num_encoded=job.num_encoded,
        disagreement=disagreement,
        skipped=dict(reasons(faults)),
        skipped_samples=[short(fault) for fault in faults],
    )
    page = basis_page(report, A, examples(plan, job, report, A))
    write_bytes_atomically(report.page, page.encode())
    if report.verdict == "poor" and not plan.accept_poor_fit:
        raise refusal(report)
    save_basis(report.path, basis_of(plan, job, report, A))
    if not plan.keep_statistics:
        shutil.rmtree(job.statistics.folder.parent, ignore_errors=True)
    return report


def refusal(report: BasisReport) -> BadData:
    score = report.score
    why = (
        "They keep no low-level detail (representation autoencoders do not), or belong to other "
        f"images: see {report.page}"
    )
    better = [c.score.r2 for c in report.comparisons if c.name == OWN_COLORS]
    if better and better[0] >= MARGINAL_R2:
        why = (
            f"With the colour statistics of these images R2 would be {better[0]:.3f}: set "
            f"color.mean and color.std to fit; see {report.page}"
        )
    return BadData(
        f"the latents do not match the pixels: held-out R2 = {score.r2:.3f}, below "
        f"{MARGINAL_R2:g} (captured {score.captured:.3f}, explained {score.explained:.3f}); no "
        f"basis was written.\n{why}\n"
        "To use it all the same, --accept-poor-fit; the statistics are kept, nothing is read again."
    )


def check_moments(plan: FitPlan, fit: Moments, judge: Moments) -> None:
    if fit.num_tokens < plan.geometry.d or judge.num_tokens == 0:
        raise BadData(
            f"{fit.num_tokens} tokens of {fit.num_images} images to fit and {judge.num_tokens} to "
            f"judge are too few for {plan.geometry.d} directions; give more images"
        )
    for moments in (fit, judge):
        if not moments.energy_z > 0:
            raise BadData("every cached latent is zero; make the cache again")


def is_of_one_color(moments: Moments, raw: Moments, std: float) -> bool:
    """Whether the pixels are the mean and rounding; a std of zero makes them NaN or infinite."""
    rounding = ROUNDING * raw.gram.trace() / std**2
    return not bool(rounding < moments.gram.trace() < math.inf)


def solve(method: str, moments: Moments) -> tuple[Tensor, Tensor]:
    """(A, singular values of the cross moments)."""
    A, spectrum = procrustes(moments)
    if method == "pca":
        A = rotate_to_latents(pca(moments, len(spectrum))[0], moments)
    return A, spectrum


NAMES = {"procrustes": "Procrustes", "pca": "PCA, rotated to the latents"}


def verdict_on(r2: float) -> Verdict:
    if r2 >= GOOD_R2:
        return "good"
    return "marginal" if r2 >= MARGINAL_R2 else "poor"


def compare(plan: FitPlan, A: Tensor, s: float, fit: Moments, judge: Moments) -> list[Comparison]:
    """The chosen basis among others, on the same held-out images."""
    other = "pca" if plan.method == "procrustes" else "procrustes"
    D, d = A.shape
    bases = {
        NAMES[other]: solve(other, fit)[0],
        "PCA, not rotated to the latents": pca(fit, d)[0],
        "random directions": random_basis(D, d, torch.Generator().manual_seed(0)),
    }
    rows = [(f"{NAMES[plan.method]} (this basis)", A, s)]
    rows += [("this basis, least-squares s", A, least_squares_scale(A, fit))]
    rows += [(name, B, norm_matched_scale(B, fit)) for name, B in bases.items()]
    found = [Comparison(name, scale, alignment(B, scale, judge)) for name, B, scale in rows]
    return [one for one in found if math.isfinite(one.score.r2)]


def compare_colors(plan: FitPlan, raw_fit: Moments, raw_judge: Moments) -> list[Comparison]:
    """The same method with other colour statistics; dividing alone would only rescale s."""
    patch, rows = plan.geometry.pixel_patch, []
    choices = {MEAN_LEFT_IN: ((0.0, 0.0, 0.0), 1.0)}
    if "fit" not in (plan.mean, plan.std):
        choices[OWN_COLORS] = color_statistics(raw_fit, patch)
    for name, (mean, std) in choices.items():
        fit, judge = (normalised(m, mean, std, patch) for m in (raw_fit, raw_judge))
        if is_of_one_color(fit, raw_fit, std) or is_of_one_color(judge, raw_judge, std):
            continue  # black pictures, or of one colour: nothing to compare
        A, _ = solve(plan.method, fit)
        s = norm_matched_scale(A, fit)
        rows.append(Comparison(name, s, alignment(A, s, judge)))
    return [row for row in rows if math.isfinite(row.score.r2)]


MEAN_LEFT_IN = "mean of the colours left in"
OWN_COLORS = "colour mean and std of these images"


def converge(
    plan: FitPlan, job: Job, color: ColorCode, judge: Moments
) -> list[tuple[int, float, float]]:
    """(images, R2, captured) at every power of two, and at the end."""
    points, read = [], 0
    for chunk, (moments, _) in zip(job.fit, job.statistics.running(job.fit), strict=True):
        read += len(chunk.records)
        due = read & (read - 1) == 0 or chunk is job.fit[-1]
        if due and moments.num_tokens >= plan.geometry.d:
            some = normalised(moments, color.mean, color.std, plan.geometry.pixel_patch)
            A, _ = solve(plan.method, some)
            score = alignment(A, norm_matched_scale(A, some), judge)
            if math.isfinite(score.r2):
                points.append((moments.num_images, score.r2, score.captured))
    return points


def basis_of(plan: FitPlan, job: Job, report: BasisReport, A: Tensor) -> Basis:
    return Basis(
        A=A.float(),
        s=report.s,
        patch=report.patch,
        method=plan.method,
        family=plan.family.name,
        color=report.color,
        num_images=report.num_images,
        alignment=asdict(report.score),
        spectrum=report.spectrum,
        vae_fingerprint=job.autoencoder.fingerprint if job.autoencoder else None,
        facts={
            "fingerprint": job.fingerprint,
            "data": job.data_fingerprint,
            "sources": job.sources(),
            "tokens_per_image": plan.tokens_per_image,
            "versions": {"asymlift": asymlift.__version__, "torch": torch.__version__},
            "report": report.facts(),
        },
    )


def short(fault: BadSample) -> str:
    """Without the folders, which are nobody's business in a file that travels."""
    shard, mark, key = fault.where.rpartition("!")
    name = f"{os.path.basename(shard)}!{key}" if mark else os.path.basename(key)  # noqa: PTH119
    detail = re.sub(r"\S*/", "", fault.detail)
    return f"{name}: {fault.reason} ({detail})" if detail else f"{name}: {fault.reason}"


def examples(plan: FitPlan, job: Job, report: BasisReport, A: Tensor) -> list[HeldOutPictures]:
    """The first few images that judge, as the basis and as the VAE show them."""
    made: list[HeldOutPictures] = []
    for record in (record for chunk in job.judge for record in chunk.records):
        if len(made) == PICTURES:
            break
        try:
            pair = job.pairs.pair(record)
        except BadSample:
            continue
        decoded = job.autoencoder.decode(pair.latent[None])[0] if job.autoencoder else None
        made.append(renderings(*pair, decoded, report, A.float(), plan.geometry.patch))
    return made
