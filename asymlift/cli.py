"""The commands: parse, load the recipe, call a stage, print. torch loads only when a stage runs."""

import functools
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from asymlift import __version__
from asymlift.errors import Exit, UserError
from asymlift.recipe import Recipe, load_recipe
from asymlift.runtime import log

app = typer.Typer(
    name="asymlift",
    help="Turn a latent flow image model into a pixel-space model that beats it.",
    no_args_is_help=True,
    pretty_exceptions_show_locals=False,
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


def command(name: str) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Register a command whose user errors end in a message and an exit code."""

    def register(function: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(function)
        def run(*args: Any, verbose: int = 0, quiet: bool = False, **kwargs: Any) -> Any:
            log.set_verbosity(-1 if quiet else verbose)
            try:
                return function(*args, verbose=verbose, quiet=quiet, **kwargs)
            except UserError as error:
                fail(error, as_json=bool(kwargs.get("as_json")))

        return app.command(name)(run)

    return register


def fail(error: UserError, *, as_json: bool) -> None:
    if as_json:
        log.print_json({"error": str(error), "exit": int(error.exit)})
    sys.stderr.write(f"error: {error}\n")
    raise typer.Exit(int(error.exit))


def main() -> None:
    app()


@app.callback(invoke_without_command=True)
def version(
    show: Annotated[bool, typer.Option("--version", help="Print the version and stop.")] = False,
) -> None:
    if show:
        typer.echo(f"asymlift {__version__}")
        raise typer.Exit


def show_plan(recipe: Recipe, *, as_json: bool, checks: dict[str, Any]) -> None:
    """What --dry-run prints: the recipe with every default, and what was found."""
    resolved = json.loads(recipe.model_dump_json())
    if as_json:
        log.print_json({"recipe": resolved, "checks": checks})
        return
    import yaml

    typer.echo(yaml.safe_dump(resolved, sort_keys=False, default_flow_style=None, width=100))
    for name, value in checks.items():
        log.say(f"{name}: {value}")


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
    from asymlift.stages import plans

    if dry_run:
        return show_plan(plan, as_json=as_json, checks=plans.check_fit_basis(plan))
    report = plans.run_fit_basis(plan, accept_poor_fit=accept_poor_fit, overwrite=overwrite)
    plans.finish(report, f"asymlift convert {recipe}", as_json=as_json)


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
    from asymlift.stages import plans

    if dry_run:
        return show_plan(plan, as_json=as_json, checks=plans.check_convert(plan))
    report = plans.run_convert(plan, verify=verify, overwrite=overwrite)
    plans.finish(report, f"asymlift finetune {recipe}", as_json=as_json)


@command("finetune")
def finetune(
    recipe: RecipeFile,
    overrides: Overrides = [],
    dry_run: DryRun = False,
    as_json: AsJson = False,
    verbose: Verbose = 0,
    quiet: Quiet = False,
) -> None:
    """Train the lifted model on the shards. Run again, it goes on."""
    plan = load_recipe(recipe, overrides)
    from asymlift.stages import plans

    if dry_run:
        return show_plan(plan, as_json=as_json, checks=plans.check_finetune(plan))
    report = plans.run_finetune(plan)
    plans.finish(report, f'asymlift sample {recipe} --prompt "..."', as_json=as_json)


@command("sample")
def sample(
    recipe: RecipeFile,
    prompt: Annotated[list[str], typer.Option("--prompt", help="Repeatable.")] = [],
    prompts: Annotated[
        Path | None, typer.Option("--prompts", help="A text file, one prompt per line.")
    ] = None,
    weights: Annotated[
        list[str], typer.Option("--weights", help="ema, raw, lifted or base; repeatable.")
    ] = [],
    compare: Annotated[
        bool, typer.Option("--compare", help="base, lifted and ema from the same noise.")
    ] = False,
    step: Annotated[int | None, typer.Option(help="A checkpoint; the newest if not given.")] = None,
    num: Annotated[int, typer.Option("--num", help="Pictures per prompt.")] = 1,
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
    from asymlift.stages import plans

    request = plans.SampleRequest(
        prompts=tuple(prompt),
        prompts_file=prompts,
        weights=tuple(weights),
        compare=compare,
        step=step,
        num=num,
        out=out,
        overwrite=overwrite,
    )
    if dry_run:
        return show_plan(plan, as_json=as_json, checks=plans.check_sample(plan, request))
    plans.finish(plans.run_sample(plan, request), None, as_json=as_json)
