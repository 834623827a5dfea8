"""The verbs of the command line: from a recipe to each stage and back to what is printed."""

import dataclasses
import hashlib
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args

from asymlift.artifacts.checkpoint import newest_whole, step_folder
from asymlift.artifacts.files import human_bytes, plural
from asymlift.artifacts.lifted_folder import read_lifted
from asymlift.data.buckets import buckets
from asymlift.data.catalog import expand
from asymlift.data.reference_picture import digest, reference_bytes
from asymlift.data.stream import expand_urls
from asymlift.errors import BadData, BadRecipe, StoppedEarly, Unavailable
from asymlift.families import family_of_lifted
from asymlift.maths.color import ColorCode
from asymlift.recipe import Patterns, Recipe
from asymlift.report.basis_report import BasisReport
from asymlift.report.prepare_report import PrepareReport
from asymlift.runtime import dist, log
from asymlift.runtime.signals import stop_requests
from asymlift.stages.convert import ConvertPlan, ConvertReport, convert
from asymlift.stages.finetune.data import may_keep_sizes, sizes_of_lifted
from asymlift.stages.finetune.preview import read_prompts
from asymlift.stages.finetune.preview import settings_of as sampling_settings
from asymlift.stages.finetune.resume import chosen_checkpoint
from asymlift.stages.finetune.run import FinetuneReport, finetune
from asymlift.stages.finetune.start import AUTO, Start, accumulation_for, check_packages
from asymlift.stages.fit_basis import FitPlan, fit_basis
from asymlift.stages.locate import (
    base_folder,
    basis_path,
    checkpoints_path,
    family_of,
    lifted_path,
    named_family,
    needed,
)
from asymlift.stages.open_data import fit_of
from asymlift.stages.prepare.finish import PAGE, REJECTED
from asymlift.stages.prepare.job import Estimate, Job, check_sizes, settings_of
from asymlift.stages.prepare.run import Share, prepare
from asymlift.stages.prepare.work import find_work
from asymlift.stages.provenance import record
from asymlift.stages.sample import SamplePlan, SampleReport, check, sample
from asymlift.stages.sample_folder import Weights

# ---- prepare -----------------------------------------------------------------------------------


def run_prepare(recipe: Recipe, share: Share, *, overwrite: bool = False) -> PrepareReport:
    quiet_unless_first(dist.discover_tasks())
    with stop_requests() as request:

        def check_stop() -> None:
            if request.reason is not None:
                said = f"stopped by {request.reason}; finished shards are kept"
                raise StoppedEarly(f"{said}: run the same command again to go on", request.exit)

        job = prepare_job(recipe, check_stop=check_stop)
        return prepare(job, share, overwrite=overwrite)


def estimate_prepare(recipe: Recipe) -> Estimate:
    return prepare_job(recipe, look_only=True).estimate()


def prepare_job(
    recipe: Recipe, *, look_only: bool = False, check_stop: Callable[[], None] = lambda: None
) -> Job:
    settings_of(recipe)
    base = base_folder(recipe)
    family, geometry = family_of(recipe, base)
    device = dist.device_for(dist.discover_tasks())
    return Job(recipe, base, family, geometry, device, look_only=look_only, check_stop=check_stop)


def after_prepare(recipe: Recipe, following: str) -> str:
    """The next command, and before it what to set where the recipe does not read what was made."""
    data, settings = recipe.data, settings_of(recipe)
    cached = settings.image == "none"
    key, given = ("cache", data.cache) if cached else ("train", data.train)
    if any(reads(p, Path(settings.out)) for p in (given, None if cached else data.validation)):
        return following
    return f"set data.{key} to {settings.out} (it is {given}), then {following}"


def reads(patterns: Patterns | None, folder: Path) -> bool:
    """Whether some of the patterns stand for shards in the folder."""
    for pattern in [patterns] if isinstance(patterns, str) else patterns or []:
        try:
            folders = {shard.parent for shard in expand(pattern).shards}
        except BadData:  # nothing is there, or it is no place for random access
            continue
        if any(parent.resolve() == folder.resolve() for parent in folders):
            return True
    return False


def share_for(number: int | None, of: int | None) -> Share:
    """Which part of the work is this process's: by the options, or by the launcher."""
    if (number is None) != (of is None):
        raise BadRecipe("--shard-index and --num-shards belong together")
    if number is None or of is None:
        ranks = dist.discover_tasks()
        return Share(ranks.rank, ranks.world, together=ranks.world > 1)
    if not 0 <= number < of:
        raise BadRecipe(f"--shard-index {number}: must be from 0 to {of - 1} (--num-shards {of})")
    return Share(number, of)


def check_prepare(recipe: Recipe) -> dict[str, Any]:
    settings, base = settings_of(recipe), base_folder(recipe)
    family, geometry = family_of(recipe, base)
    work, fit = find_work(recipe, look_only=True), fit_of(recipe.data.resize, geometry.pixel_patch)
    check_sizes(recipe, base, family, geometry, work)
    sizes = [size for side in buckets(fit).values() for size in side]
    return {
        "base": str(base),
        "family": family.name,
        "pictures": len(work),
        "left out already": len(work.faults),
        "sizes": f"{len(sizes)}, multiples of {geometry.pixel_patch} pixels",
        "would write": settings.out,
    }


# ---- fit-basis ---------------------------------------------------------------------------------


def run_fit_basis(
    recipe: Recipe, *, accept_poor_fit: bool = False, overwrite: bool = False
) -> BasisReport | None:
    base, ranks = base_folder(recipe), dist.discover()
    quiet_unless_first(ranks)
    family, geometry = family_of(recipe, base)
    plan = FitPlan(
        data=recipe.data,
        family=family,
        geometry=geometry,
        out=recipe.run_folder,
        base=base,
        space=recipe.color.space,
        mean=recipe.color.mean,
        std=recipe.color.std,
        method=recipe.basis.method,
        images=recipe.basis.images,
        holdout=recipe.basis.holdout,
        tokens_per_image=recipe.basis.tokens_per_image,
        accept_poor_fit=accept_poor_fit,
        overwrite=overwrite,
        device=str(dist.device_for(ranks)),
        rank=ranks.rank,
        world=ranks.world,
    )
    if ranks.first:
        record(recipe, "fit-basis")
    with stop_requests() as request:
        try:
            return fit_basis(plan, stop=lambda: request.reason is not None)
        except StoppedEarly as stopped:
            stopped.exit = request.exit
            raise


def check_fit_basis(recipe: Recipe) -> dict[str, Any]:
    base = base_folder(recipe)
    family, geometry = family_of(recipe, base)
    return {
        "base": str(base),
        "family": family.name,
        "latent token": f"{geometry.d} numbers",
        "pixel token": f"{geometry.D} numbers, patches of {geometry.pixel_patch} pixels",
        **about_data(recipe),
        "would write": str(basis_path(recipe)),
    }


def about_data(recipe: Recipe) -> dict[str, int]:
    found = expand(recipe.data.train)
    counts = {"shards": len(found.shards), "folders and tables": len(found.listings)}
    return {name: count for name, count in counts.items() if count}


def num_sources(patterns: Patterns) -> str:
    found = expand(patterns)
    return plural(len(found.shards) + len(found.listings), "source")


def about_stream(recipe: Recipe) -> dict[str, int]:
    return {"shards, streamed": len(expand_urls(recipe.data.train))}


# ---- convert -----------------------------------------------------------------------------------


def run_convert(
    recipe: Recipe, *, verify: Literal["auto", "maps", "full"] = "auto", overwrite: bool = False
) -> ConvertReport | None:
    """One rank is enough; the others have nothing to do."""
    if not dist.discover().first:
        return None
    base = base_folder(recipe)
    family, _ = family_of(recipe, base)
    basis = needed(basis_path(recipe), "fit-basis")
    record(recipe, "convert")
    return convert(
        ConvertPlan(
            base=base,
            basis=basis,
            output=lifted_path(recipe),
            family=family,
            family_name=recipe.model.family if ":" in recipe.model.family else "",
            color=color_of(recipe),
            verify=verify,
            text_length=recipe.model.text_length,
            overwrite=overwrite,
        )
    )


def color_of(recipe: Recipe) -> ColorCode | None:
    """The recipe's colour code, for a basis of the published code, which does not name its own."""
    mean, std = recipe.color.mean, recipe.color.std
    if mean == "fit" or std == "fit":
        return None
    return ColorCode(recipe.color.space, mean, std)


def check_convert(recipe: Recipe) -> dict[str, Any]:
    base = base_folder(recipe)
    family, geometry = family_of(recipe, base)
    return {
        "base": str(base),
        "family": family.name,
        "basis": str(needed(basis_path(recipe), "fit-basis")),
        "first map": f"{family.first}: reads {geometry.d} numbers now, {geometry.D} lifted",
        "last map": f"{family.last}: writes {geometry.d} numbers now, {geometry.D} lifted",
        "would write": str(lifted_path(recipe)),
    }


# ---- finetune ----------------------------------------------------------------------------------


def run_finetune(recipe: Recipe, start: Start | None = None) -> FinetuneReport:
    ranks = dist.discover()
    quiet_unless_first(ranks)
    needed(lifted_path(recipe), "convert")
    return finetune(recipe, ranks, start)


def check_finetune(recipe: Recipe, resume: str = AUTO) -> dict[str, Any]:
    ranks = dist.discover()
    accumulation = accumulation_for(recipe.finetune, ranks)
    check_packages(recipe.finetune)
    if recipe.finetune.preview is not None:
        read_prompts(recipe.finetune.preview.prompts, "finetune.preview.prompts")
    held_out = recipe.data.validation if recipe.finetune.validation is not None else None
    lifted = read_lifted(needed(lifted_path(recipe), "convert"))
    sizes_of_lifted(lifted, family_of_lifted(lifted.family, named_family(recipe))).check_recipe(
        recipe, stored=may_keep_sizes(recipe.data)
    )
    found = chosen_checkpoint(checkpoints_path(recipe), resume)
    return {
        "lifted": str(lifted.folder),
        **(about_stream(recipe) if recipe.data.mode == "stream" else about_data(recipe)),
        **({"held out": num_sources(held_out)} if held_out else {}),
        "ranks": ranks.world,
        "batch": f"{ranks.world} x {recipe.finetune.micro_batch} x {accumulation} accumulated",
        "starts at step": found.step if found else 0,
        "ends at step": recipe.finetune.steps,
    }


# ---- sample ------------------------------------------------------------------------------------


@dataclass(frozen=True)
class SampleRequest:
    """What the command line adds to the recipe's `sample` section."""

    prompts: tuple[str, ...] = ()
    prompts_file: Path | None = None
    references: tuple[Path, ...] = ()
    weights: tuple[str, ...] = ()
    compare: bool = False
    step: int | None = None
    num: int = 1
    out: Path | None = None
    overwrite: bool = False


def run_sample(recipe: Recipe, request: SampleRequest) -> SampleReport:
    quiet_unless_first(dist.discover())
    return sample(sample_plan(recipe, request))


def sample_plan(recipe: Recipe, request: SampleRequest) -> SamplePlan:
    prompts = list(request.prompts)
    if request.prompts_file is not None:
        prompts += read_prompts(str(request.prompts_file), "--prompts")
    if not prompts:
        raise BadRecipe('no prompts: give --prompt "...", or --prompts FILE')
    weights = chosen_weights(recipe, request)
    use, trained = recipe.sample, {"ema", "raw"} & set(weights)
    checkpoint = checkpoint_for(recipe, request.step) if trained else None
    return SamplePlan(
        out=request.out or recipe.run_folder / "samples" / folder_name(prompts, request.references),
        prompts=tuple(prompts),
        height=use.height,
        width=use.width,
        weights=weights,
        settings=sampling_settings(use),
        base=base_folder(recipe) if "base" in weights else None,
        lifted=needed(lifted_path(recipe), "convert"),
        checkpoint=checkpoint,
        family=named_family(recipe),
        seed=use.seed,
        num_per_prompt=request.num,
        references=request.references,
        text_length=recipe.model.text_length,
        batch=use.batch,
        overwrite=request.overwrite,
    )


def folder_name(prompts: Sequence[str], references: Sequence[Path] = ()) -> str:
    """The first prompt, readable, and a digest of all: others, or other pictures to go by, differ.

    Prompts alone have the name that they always had.
    """
    words = re.sub(r"[^a-z0-9]+", "-", prompts[0].lower()).strip("-")[:40]
    seen = [digest(reference_bytes(path)) for path in references]
    together = hashlib.sha256("\n".join([*prompts, *seen]).encode()).hexdigest()[:6]
    return f"prompts-{words}-{together}"


def chosen_weights(recipe: Recipe, request: SampleRequest) -> tuple[Weights, ...]:
    for name in request.weights:
        if name not in get_args(Weights):
            raise BadRecipe(f"--weights {name}: choose from {', '.join(get_args(Weights))}")
    if request.compare:
        return ("base", "lifted", "ema" if recipe.finetune.ema else "raw")
    given: tuple[Any, ...] = tuple(dict.fromkeys(request.weights)) or (
        "ema" if recipe.finetune.ema else "raw",
    )
    return given


def checkpoint_for(recipe: Recipe, step: int | None) -> Path:
    checkpoints = checkpoints_path(recipe)
    if step is not None:
        return needed(step_folder(checkpoints, step), "finetune")
    found = newest_whole(checkpoints, log.warn)
    if found is None:
        raise Unavailable(
            f"{checkpoints}: no checkpoint; run `asymlift finetune` first, or sample the "
            "converted model with --weights lifted"
        )
    return found.folder


def check_sample(recipe: Recipe, request: SampleRequest) -> dict[str, Any]:
    plan = sample_plan(recipe, request)
    check(plan)
    return {
        "weights": ", ".join(plan.weights),
        "checkpoint": str(plan.checkpoint) if plan.checkpoint else None,
        "pictures": len(plan.prompts) * plan.num_per_prompt * len(plan.weights),
        **({"references": len(plan.references)} if plan.references else {}),
        "would write": str(plan.out),
    }


# ---- what is printed ---------------------------------------------------------------------------


def quiet_unless_first(ranks: dist.Ranks) -> None:
    """One voice: rank 0 speaks, the others only warn of what ends them."""
    if not ranks.first:
        log.set_verbosity(-1)


FEW_JUDGES = 16  # below that a held-out R2 says little


def describe_basis(report: BasisReport) -> list[str]:
    score = report.score
    few = report.num_judges < FEW_JUDGES
    return [
        f"{'already there: ' if report.already_done else 'wrote '}{report.path}: rank "
        f"{report.rank}, patches of {report.patch} pixels, s = {report.s:.4f}",
        f"fit: {report.verdict} (provisional thresholds: good from R2 0.5, marginal from 0)",
        f"held-out images: R2 {score.r2:.3f} x captured energy {score.captured:.3f} = explained "
        f"{score.explained:.3f}",
        *([f"only {report.num_judges} image(s) judge it: too few to trust"] if few else []),
        f"see {report.page}",
    ]


def describe_conversion(report: ConvertReport) -> list[str]:
    lines = [
        f"{'already there: ' if report.already_done else 'wrote '}{report.path}: rank "
        f"{report.rank}, patches of {report.patch} pixels, s = {report.scale:.4f}"
    ]
    if report.maps is not None:
        lines.append(
            f"the two maps, read back: relative error {report.maps.first:.1e} (first), "
            f"{report.maps.last:.1e} (last), {report.maps.outside:.1e} outside the subspace"
        )
    if report.coupling is not None:
        lines.append(
            f"sampling in pixels = s A z of sampling in latents: {report.coupling.psnr:.1f} dB, "
            f"relative error {report.coupling.error:.1e} ({report.coupling.steps} Euler steps)"
        )
    if report.license:
        lines.append(f"license of the base model: {report.license}")
    return lines + list(report.notes)


def describe_finetune(report: FinetuneReport) -> list[str]:
    lines = [f"step {report.step}: {report.checkpoint}"]
    if report.last:
        words = ("loss", "loss_flow", "loss_perceptual", "control")
        shown = {key: report.last[key] for key in words if key in report.last}
        values = ", ".join(f"{name} {value:.4g}" for name, value in shown.items())
        lines.append(f"{values}; {report.seconds:.0f} s")
    else:
        lines.append("all steps were done already")
    if report.bad_samples:
        reasons = ", ".join(f"{reason} {count}" for reason, count in report.bad_samples.items())
        lines.append(f"bad samples left out: {reasons}; see {report.folder / 'logs'}")
    return lines


def describe_samples(report: SampleReport) -> list[str]:
    drawn = f"{report.num_drawn} drawn" if report.num_drawn else "all there already"
    lines = [f"{len(report.pictures)} pictures in {report.folder}: {drawn}"]
    if report.grid is not None:
        lines.append(f"side by side: {report.grid}")
    return lines


def describe_preparation(report: PrepareReport) -> list[str]:
    if not report.complete:
        rest = "another task is finishing"
        if report.num_missing:
            still = "is" if report.num_missing == 1 else "are"
            rest = (
                f"{report.num_missing} {still} still to come; whoever makes the last one finishes"
            )
        made = f"{report.num_made} of {plural(report.num_shards, 'shard')}"
        return [f"this task made {made}; {rest}"]
    lines = [
        f"{'already there: ' if report.already_done else 'wrote '}{report.out}: "
        f"{plural(report.num_samples, 'sample')} in {plural(report.num_shards, 'shard')}, "
        f"{human_bytes(report.num_bytes)}, {plural(len(report.buckets), 'size')}"
    ]
    if report.rejected:
        lines.append(f"left out: {by_count(report.rejected)}; see {report.out / REJECTED}")
    lines += [line for line in (report.advice, report.without_caption) if line]
    return [*lines, f"see {report.out / PAGE}"]


def by_count(reasons: Mapping[str, int]) -> str:
    return ", ".join(f"{reason} {count}" for reason, count in reasons.items())


def describe_estimate(found: Estimate) -> list[str]:
    parts = ", ".join(
        f"{name} {human_bytes(count)}" for name, count in found.bytes_per_sample.items() if count
    )
    return [
        f"{plural(found.num_pictures, 'picture')}; of {found.num_looked_at} looked at, "
        f"{found.num_usable} can be used",
        *([f"left out of these: {by_count(found.left_out)}"] if found.left_out else []),
        *([found.advice] if found.advice else []),
        *([f"left out before: {by_count(found.not_listed)}"] if found.not_listed else []),
        f"a sample takes {human_bytes(found.per_sample)}: {parts}",
        f"all of them {human_bytes(found.total)}; {human_bytes(found.free)} are free",
    ]


DESCRIPTIONS: dict[type[Any], Callable[[Any], Sequence[str]]] = {
    BasisReport: describe_basis,
    ConvertReport: describe_conversion,
    FinetuneReport: describe_finetune,
    SampleReport: describe_samples,
    PrepareReport: describe_preparation,
    Estimate: describe_estimate,
}


def finish(report: Any, next_command: str | None, *, as_json: bool) -> None:
    """Print a report, as lines or as JSON, and what to run next."""
    if report is None or not dist.discover_tasks().first:
        return
    if as_json:
        log.print_json(dataclasses.asdict(report))
        return
    for line in DESCRIPTIONS[type(report)](report):
        log.say(line)
    if next_command:
        log.say(f"next: {next_command}")
