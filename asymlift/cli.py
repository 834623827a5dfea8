"""The commands: parse, load the recipe, call a stage, print. torch loads only when a stage runs."""

import dataclasses
import functools
import json
import os
import shlex
import sys
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any, Literal

import typer
import typer.core

from asymlift import __version__
from asymlift.errors import Exit, StoppedEarly, UserError
from asymlift.recipe import Recipe, load_recipe
from asymlift.redact import redacted, redacted_values
from asymlift.runtime import log
from asymlift.runtime.launch import ranks_in
from asymlift.runtime.signals import raising_on_signals

UsageError: Any = typer.BadParameter.__base__  # typer shows no other name for it


class Commands(typer.core.TyperGroup):
    """All commands; with --json, wrong use is one document too."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        ctx.meta["as_json"] = "--json" in args
        return super().parse_args(ctx, args)

    def invoke(self, ctx: Any) -> Any:
        try:
            return super().invoke(ctx)
        except UsageError as error:
            if ctx.meta["as_json"]:
                print_error(error.format_message(), Exit.USAGE)
            raise


app = typer.Typer(
    name="asymlift",
    cls=Commands,
    help="Turn a latent flow image model into a pixel-space model that beats it.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,  # a traceback is ours to show: see `main`
    rich_markup_mode=None,
    context_settings={"help_option_names": ["-h", "--help"]},
)

RecipeFile = Annotated[Path, typer.Argument(metavar="RECIPE", help="A recipe, YAML.")]
Overrides = Annotated[
    list[str], typer.Option("--set", metavar="SECTION.KEY=VALUE", help="Change one value.")
]
DryRun = Annotated[bool, typer.Option("--dry-run", help="Resolve, check, print; write nothing.")]
AsJson = Annotated[bool, typer.Option("--json", help="One JSON document on stdout.")]
Verbose = Annotated[int, typer.Option("--verbose", "-v", count=True, help="Say more.")]
Quiet = Annotated[bool, typer.Option("--quiet", "-q", help="Say only what went wrong.")]
Overwrite = Annotated[bool, typer.Option("--overwrite", help="Replace what is there.")]


GO_ON = "what is finished is kept: run the same command again to go on"


def command(name: str) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Register a command whose user errors end in a message and an exit code."""

    def register(function: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(function)
        def run(*args: Any, verbose: int = 0, quiet: bool = False, **kwargs: Any) -> Any:
            log.set_verbosity(-1 if quiet else verbose)
            as_json = bool(kwargs.get("as_json"))
            try:
                with raising_on_signals():
                    return function(*args, verbose=verbose, quiet=quiet, **kwargs)
            except UserError as error:
                fail(error, as_json=as_json)
            except KeyboardInterrupt:
                fail(StoppedEarly("interrupted; " + GO_ON, Exit.INTERRUPTED), as_json=as_json)
            except (SystemExit, typer.Exit):
                raise
            except Exception as error:  # our own mistake: its traceback follows
                if as_json:
                    print_error(f"{type(error).__name__}: {error}", Exit.UNEXPECTED)
                raise

        return app.command(name)(run)

    return register


def print_error(said: str, code: Exit) -> None:
    """One document, though every rank of a run has failed."""
    try:
        first = ranks_in(os.environ).first
    except UserError:  # that may be what is said
        first = True
    if first:
        log.print_json({"error": said, "exit": int(code)})


def fail(error: UserError, *, as_json: bool) -> None:
    if as_json:
        print_error(str(error), error.exit)
    sys.stderr.write(f"error: {error}\n")
    raise typer.Exit(int(error.exit))


def main() -> None:
    try:
        app()
    except SystemExit as leaving:
        if is_one_of_a_group() and isinstance(leaving.code, int):
            from asymlift.runtime import dist

            dist.end_process(leaving.code)
        raise
    except Exception:
        sys.stderr.write(redacted(traceback.format_exc()))
        if is_one_of_a_group():
            from asymlift.runtime import dist

            dist.end_process(int(Exit.UNEXPECTED))
        raise SystemExit(int(Exit.UNEXPECTED)) from None


def is_one_of_a_group() -> bool:
    """Whether this process joined others; known without importing torch."""
    found = sys.modules.get("torch.distributed")
    return found is not None and bool(found.is_initialized())


@app.callback(invoke_without_command=True)
def version(
    show: Annotated[bool, typer.Option("--version", help="Print the version and stop.")] = False,
    local_rank: Annotated[
        # deepspeed puts it before the command; LOCAL_RANK says the same.
        int | None, typer.Option("--local-rank", "--local_rank", hidden=True)
    ] = None,
) -> None:
    if show:
        typer.echo(f"asymlift {__version__}")
        raise typer.Exit


def following(verb: str, recipe: Path, overrides: list[str]) -> str:
    """The command that comes next, of the same recipe with the same values changed."""
    changed = [word for override in overrides for word in ("--set", override)]
    return shlex.join(["asymlift", verb, str(recipe), *changed])


def show_plan(recipe: Recipe, *, as_json: bool, checks: dict[str, Any]) -> None:
    """What --dry-run prints: the recipe with every default, and what was found."""
    resolved = json.loads(recipe.model_dump_json())
    if as_json:
        log.print_json({"recipe": resolved, "checks": checks})
        return
    import yaml

    clean = redacted_values(resolved)
    log.answer(yaml.safe_dump(clean, sort_keys=False, default_flow_style=None, width=100))
    for name, value in checks.items():
        log.say(f"{name}: {value}")


@command("prepare")
def prepare(
    recipe: RecipeFile,
    overrides: Overrides = [],
    estimate: Annotated[
        bool, typer.Option("--estimate", help="Weigh a few samples; write nothing.")
    ] = False,
    shard_index: Annotated[
        int | None, typer.Option("--shard-index", help="Which of --num-shards tasks this is.")
    ] = None,
    num_shards: Annotated[
        int | None, typer.Option("--num-shards", help="Tasks that share the work.")
    ] = None,
    overwrite: Overwrite = False,
    dry_run: DryRun = False,
    as_json: AsJson = False,
    verbose: Verbose = 0,
    quiet: Quiet = False,
) -> None:
    """Turn pictures with captions into training shards."""
    plan = load_recipe(recipe, overrides)
    from asymlift.stages import verbs

    share = verbs.share_for(shard_index, num_shards)
    if dry_run:
        show_plan(plan, as_json=as_json, checks=verbs.check_prepare(plan))
    elif estimate:
        verbs.finish(
            verbs.estimate_prepare(plan), following("prepare", recipe, overrides), as_json=as_json
        )
    else:
        report = verbs.run_prepare(plan, share, overwrite=overwrite)
        fit = following("fit-basis", recipe, overrides)
        then = verbs.after_prepare(plan, fit) if report.complete else None
        verbs.finish(report, then, as_json=as_json)


@command("fit-basis")
def fit_basis(
    recipe: RecipeFile,
    overrides: Overrides = [],
    accept_poor_fit: Annotated[
        bool, typer.Option("--accept-poor-fit", help="Write a basis that does not align.")
    ] = False,
    overwrite: Overwrite = False,
    dry_run: DryRun = False,
    as_json: AsJson = False,
    verbose: Verbose = 0,
    quiet: Quiet = False,
) -> None:
    """Find the pixel subspace that matches the model's latents."""
    plan = load_recipe(recipe, overrides)
    from asymlift.stages import verbs

    if dry_run:
        show_plan(plan, as_json=as_json, checks=verbs.check_fit_basis(plan))
        return
    report = verbs.run_fit_basis(plan, accept_poor_fit=accept_poor_fit, overwrite=overwrite)
    verbs.finish(report, following("convert", recipe, overrides), as_json=as_json)


@command("convert")
def convert(
    recipe: RecipeFile,
    overrides: Overrides = [],
    verify: Annotated[
        Literal["auto", "maps", "full"],
        typer.Option(help="maps: the two maps; full: a sampling run too; auto: if it fits."),
    ] = "auto",
    overwrite: Overwrite = False,
    dry_run: DryRun = False,
    as_json: AsJson = False,
    verbose: Verbose = 0,
    quiet: Quiet = False,
) -> None:
    """Lift the base model into pixels, through the basis; verifies itself."""
    plan = load_recipe(recipe, overrides)
    from asymlift.stages import verbs

    if dry_run:
        show_plan(plan, as_json=as_json, checks=verbs.check_convert(plan))
        return
    report = verbs.run_convert(plan, verify=verify, overwrite=overwrite)
    verbs.finish(report, following("finetune", recipe, overrides), as_json=as_json)


@command("finetune")
def finetune(
    recipe: RecipeFile,
    overrides: Overrides = [],
    resume: Annotated[
        str, typer.Option("--resume", help="auto, none, or a checkpoint's folder (step-N).")
    ] = "auto",
    allow_changes: Annotated[
        bool,
        typer.Option("--allow-changes", help="Go on although the recipe trains differently."),
    ] = False,
    rehearse: Annotated[
        bool | None,
        typer.Option(
            "--rehearse/--no-rehearse",
            help="Try out what needs memory and disk before the first step; on a GPU by default.",
        ),
    ] = None,
    dry_run: DryRun = False,
    as_json: AsJson = False,
    verbose: Verbose = 0,
    quiet: Quiet = False,
) -> None:
    """Train the lifted model on the shards. Run again, it goes on."""
    plan = load_recipe(recipe, overrides)
    from asymlift.stages import verbs

    if dry_run:
        show_plan(plan, as_json=as_json, checks=verbs.check_finetune(plan, resume))
        return
    from asymlift.stages.finetune.start import Start

    start = Start(resume=resume, allow_changes=allow_changes, rehearse=rehearse)
    report = verbs.run_finetune(plan, start)
    then = following("sample", recipe, overrides) + ' --prompt "..."'
    verbs.finish(report, then, as_json=as_json)


@command("sample")
def sample(
    recipe: RecipeFile,
    prompt: Annotated[list[str], typer.Option("--prompt", help="Repeatable.")] = [],
    prompts: Annotated[
        Path | None, typer.Option("--prompts", help="A text file, one prompt per line.")
    ] = None,
    reference: Annotated[
        list[Path],
        typer.Option(
            "--reference",
            help="A picture to go by, for all prompts; repeatable. finetune trains on none.",
        ),
    ] = [],
    weights: Annotated[
        list[str], typer.Option("--weights", help="ema, raw, lifted or base; repeatable.")
    ] = [],
    compare: Annotated[
        bool, typer.Option("--compare", help="base, lifted and ema from the same noise.")
    ] = False,
    step: Annotated[
        int | None, typer.Option(min=0, help="A checkpoint; the newest if not given.")
    ] = None,
    num: Annotated[int, typer.Option("--num", min=1, help="Pictures per prompt.")] = 1,
    out: Annotated[Path | None, typer.Option("--out", help="Where the pictures go.")] = None,
    overrides: Overrides = [],
    overwrite: Overwrite = False,
    dry_run: DryRun = False,
    as_json: AsJson = False,
    verbose: Verbose = 0,
    quiet: Quiet = False,
) -> None:
    """Make pictures from prompts."""
    plan = load_recipe(recipe, overrides)
    from asymlift.stages import verbs

    request = verbs.SampleRequest(
        prompts=tuple(prompt),
        prompts_file=prompts,
        references=tuple(reference),
        weights=tuple(weights),
        compare=compare,
        step=step,
        num=num,
        out=out,
        overwrite=overwrite,
    )
    if dry_run:
        show_plan(plan, as_json=as_json, checks=verbs.check_sample(plan, request))
        return
    verbs.finish(verbs.run_sample(plan, request), None, as_json=as_json)


@command("plan")
def plan(
    recipe: RecipeFile,
    gpus: Annotated[int, typer.Option(min=1, help="On how many, of all nodes together.")] = 8,
    gpu_memory: Annotated[float, typer.Option(min=0.1, max=10_000, help="GiB, of each.")] = 80,
    overrides: Overrides = [],
    dry_run: DryRun = False,
    as_json: AsJson = False,
    verbose: Verbose = 0,
    quiet: Quiet = False,
) -> None:
    """Say what a finetune will take of memory, disk and data, and what to change if too much.

    Exits with 69 if it does not fit, as `doctor` does on a machine that is not fit.
    """
    resolved = load_recipe(recipe, overrides)
    if dry_run:
        show_plan(resolved, as_json=as_json, checks={"gpus": gpus, "GiB per GPU": gpu_memory})
        return
    from asymlift.stages.plan import estimate as stage

    report = stage.plan(resolved, gpus, gpu_memory)
    if as_json:
        log.print_json(stage.as_json(report))
    else:
        for line in stage.render(report):
            typer.echo(line)
    if not report.fits:
        raise typer.Exit(int(Exit.UNAVAILABLE))


@command("demo")
def demo(
    out: Annotated[Path, typer.Option(help="The run folder.")] = Path("runs/demo"),
    model: Annotated[
        Literal["tiny", "tiny-good-vae"],
        typer.Option(help="tiny-good-vae: an honest comparison, which promises no gain."),
    ] = "tiny",
    as_json: AsJson = False,
    verbose: Verbose = 0,
    quiet: Quiet = False,
) -> None:
    """Port the embedded tiny model to pixels and show that it beats its base."""
    from asymlift.stages import demo as stage

    report = stage.demo(out, model=model)
    stage.show(report, as_json=as_json)
    if stage.broken(report):
        raise typer.Exit(int(Exit.UNEXPECTED))


@command("families")
def families(as_json: AsJson = False, verbose: Verbose = 0, quiet: Quiet = False) -> None:
    """List the kinds of model that can be ported, and what is proven of each."""
    from asymlift.stages import families as stage

    if as_json:
        log.print_json(stage.as_json())
    else:
        log.answer_drawn(stage.render(), stage.WIDTH)
        for line in ["", *stage.remarks()]:
            log.answer(line)


@command("inspect")
def inspect(
    path: Annotated[
        Path, typer.Argument(help="Recipe, basis, model, checkpoint, run, shards or pictures.")
    ],
    picture: Annotated[
        Path | None,
        typer.Option("--picture", help="Write up to 64 samples of training data as a PNG."),
    ] = None,
    as_json: AsJson = False,
    verbose: Verbose = 0,
    quiet: Quiet = False,
) -> None:
    """Say what a file or folder is, from what it was made, and its key numbers."""
    from asymlift.stages.inspection.model import inspect_path

    found = inspect_path(path, picture)
    if as_json:
        log.print_json(dataclasses.asdict(found))
        return
    width = max((len(label) for label, _ in found.rows), default=0)
    log.answer(f"{found.kind}: {found.title}")
    for label, value in found.rows:
        log.answer(f"  {label:<{width}}  {value}")
    for problem in found.problems:
        log.answer(f"  problem: {problem}")


@command("verify")
def verify(
    path: Annotated[
        Path,
        typer.Argument(help="A basis, a lifted model, a checkpoint, shards, or a run of these."),
    ],
    as_json: AsJson = False,
    verbose: Verbose = 0,
    quiet: Quiet = False,
) -> None:
    """Check every byte of an artifact against its manifest, and every tensor in it."""
    from asymlift.stages.verify import verify as run

    verdict = run(path)
    if as_json:
        log.print_json(dataclasses.asdict(verdict))
    else:
        log.answer(f"{path}: {verdict.kind}, {'not whole' if verdict.problems else 'whole'}")
        for line in [*verdict.facts, *(f"problem: {text}" for text in verdict.problems)]:
            log.answer(f"  {line}")
    if verdict.problems:
        raise typer.Exit(int(Exit.BAD_DATA))


@command("doctor")
def doctor(
    recipe: Annotated[
        Path | None, typer.Argument(metavar="[RECIPE]", help="Also look at what it names.")
    ] = None,
    overrides: Overrides = [],
    as_json: AsJson = False,
    verbose: Verbose = 0,
    quiet: Quiet = False,
) -> None:
    """Check that this machine is fit: packages, accelerator, memory, disk."""
    plan = load_recipe(recipe, overrides) if recipe else None
    from asymlift.stages.doctor import table as stage

    checks = stage.examine(plan)
    if as_json:
        log.print_json(stage.as_json(checks))
    else:
        log.answer_drawn(stage.render(checks), stage.WIDTH)
    if not stage.is_fit(checks):
        raise typer.Exit(int(Exit.UNAVAILABLE))
