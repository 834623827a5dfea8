"""demo: the whole method on the embedded tiny model, through the stages that a user runs.

    scenes -> prepare -> fit-basis -> convert -> finetune -> sample -> measure -> demo-report.html

It ends with a table, and fails when the port does not do what it promises (the gates).
"""

import json
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from importlib.resources import files
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from asymlift.artifacts.files import write_bytes_atomically, writing
from asymlift.artifacts.manifest import canonical_json
from asymlift.data.pictures import decode_image, encode_png, float_to_image, image_to_float
from asymlift.embedded import IMAGE_SIZE, METRICS_NET, MODELS
from asymlift.embedded.metrics import Measure, Scores
from asymlift.embedded.nets import FeatureNet
from asymlift.embedded.scenes import Scenes, caption, make_scenes
from asymlift.errors import BadData, CannotWrite
from asymlift.families import FAMILIES
from asymlift.model.loading import load_pipeline
from asymlift.recipe import Recipe, load_recipe
from asymlift.report.basis_report import BasisReport
from asymlift.report.html import numbers, page, paragraph, picture, table
from asymlift.report.pictures import grid_png
from asymlift.report.prepare_report import PrepareReport
from asymlift.report.training_report import curve_sections
from asymlift.runtime import log
from asymlift.runtime.metrics import read_metrics
from asymlift.stages.convert import ConvertReport
from asymlift.stages.prepare.run import Share
from asymlift.stages.verbs import (
    SampleRequest,
    describe_basis,
    describe_conversion,
    describe_preparation,
    run_convert,
    run_finetune,
    run_fit_basis,
    run_prepare,
    run_sample,
)

WEAK, GOOD = "tiny", "tiny-good-vae"  # the embedded models
PARTS = {"train": (0, 4096), "validation": (1, 256)}  # -> seed of the scenes, and how many
NUM_PROMPTS = 256
NUM_REFERENCE = 2048  # real scenes that nothing was trained on
PROMPT_SEED, REFERENCE_SEED = 99, 555
MADE_AT_ONCE = 128
TABLE_WIDTH = 100  # also where there is no terminal that has one
SHOWN, SCALE = 12, 3  # pictures per row of a grid, and how much they are enlarged

ROWS = {  # weights as `sample` names them -> as the table does
    "base": "latent base",
    "lifted": "lifted, before training",
    "ema": "finetuned in pixels",
}
REAL, RECONSTRUCTION = "real images", "VAE reconstruction of real images"


@dataclass(frozen=True)
class Gate:
    """One promise, and whether it was kept."""

    promise: str
    found: str
    kept: bool


@dataclass(frozen=True)
class DemoReport:
    """Everything measured."""

    folder: Path
    page: Path
    scores: dict[str, Scores]
    gates: list[Gate]
    seconds: dict[str, float]


def recipe_file(name: str) -> Path:
    """A recipe of the repository, or its copy inside an installed package."""
    package = Path(str(files("asymlift")))
    for folder in (package / "recipes", package.parent / "recipes"):
        if (folder / name).is_file():
            return folder / name
    raise BadData(f"recipes/{name} is neither in the package nor beside it; install asymlift again")


def demo(out: Path, *, model: str = WEAK, overrides: Sequence[str] = ()) -> DemoReport:
    """Run everything; what is there from an earlier run is used, or gone on with."""
    torch.set_num_threads(1)  # the same sums, so the same pictures, on any number of cores
    recipe = load_recipe(
        recipe_file("tiny.yaml"),
        [
            f"name={out.name}",
            f"model.base=embedded:{model}",
            f"runs={out.parent}",
            f"data.train={out}/shards/train",
            f"data.validation={out}/shards/validation",
            *overrides,
        ],
    )
    try:
        return run_all(recipe, out, model)
    except CannotWrite as error:
        raise CannotWrite(
            f"{error}\nTo begin anew, remove {out}, or choose another --out."
        ) from None


def run_all(recipe: Recipe, out: Path, model: str) -> DemoReport:
    seconds: dict[str, float] = {}
    with timed(seconds, "prepare"):
        for made in make_data(recipe, out):
            tell(describe_preparation(made))
    with timed(seconds, "fit-basis"):
        basis = run_fit_basis(recipe)
        assert basis is not None
        tell(describe_basis(basis))
    with timed(seconds, "convert"):
        conversion = run_convert(recipe, verify="full")
        assert conversion is not None
        tell(describe_conversion(conversion))
    with timed(seconds, "finetune"):
        run_finetune(recipe)
    with timed(seconds, "sample"):
        prompts = make_scenes(range(NUM_PROMPTS), seed=PROMPT_SEED, size=IMAGE_SIZE)
        pictures = sample_all(recipe, prompts, model)
    with timed(seconds, "measure"):
        scores = measure(pictures, prompts)
    gates = check_gates(basis, conversion, scores, beats_its_base=model == WEAK)
    report = DemoReport(out, out / "demo-report.html", scores, gates, seconds)
    write_report(report, recipe, pictures, basis, conversion, ABOUT[model])
    return report


@contextmanager
def timed(seconds: dict[str, float], name: str) -> Iterator[None]:
    started = time.monotonic()
    log.say(f"-- {name}", style="bold")
    yield
    seconds[name] = round(time.monotonic() - started, 1)


def tell(lines: Sequence[str]) -> None:
    for line in lines:
        log.say(f"   {line}")


# ---- data --------------------------------------------------------------------------------------


def make_data(recipe: Recipe, out: Path) -> list[PrepareReport]:
    """A folder of pictures with captions, as a user has one, and the shards made of it."""
    made = []
    for part, (seed, count) in PARTS.items():
        pictures = out / "pictures" / part
        write_pictures(pictures, seed, count)
        paths = {"source": str(pictures), "out": str(out / "shards" / part)}
        assert recipe.prepare is not None
        section = recipe.prepare.model_copy(update=paths)
        made.append(run_prepare(recipe.model_copy(update={"prepare": section}), Share()))
    return made


def write_pictures(folder: Path, seed: int, count: int) -> None:
    """Scenes as PNG files, their captions beside them; what is there stays."""
    with writing(folder):
        folder.mkdir(parents=True, exist_ok=True)
        names = [f"{seed}-{index:06d}" for index in range(count)]
        missing = [n for n, name in enumerate(names) if not (folder / f"{name}.png").exists()]
        for start in range(0, len(missing), MADE_AT_ONCE):
            indices = missing[start : start + MADE_AT_ONCE]
            scenes = make_scenes(indices, seed=seed, size=IMAGE_SIZE)
            images = float_to_image(scenes.image * 2 - 1)
            for index, image, words in zip(indices, images, scenes.captions, strict=True):
                (folder / f"{names[index]}.txt").write_text(words)
                part = folder / f".{names[index]}.part"
                part.write_bytes(encode_png(image))
                part.replace(folder / f"{names[index]}.png")


# ---- pictures and numbers ----------------------------------------------------------------------


def sample_all(recipe: Recipe, prompts: Scenes, model: str) -> dict[str, Tensor]:
    """Pictures (n, 3, S, S) in [-1, 1] of every row of the table, in the order of the prompts."""
    folder = recipe.run_folder / "samples" / "compare"
    captions = tuple(caption(row) for row in prompts.labels)
    report = run_sample(recipe, SampleRequest(prompts=captions, compare=True, out=folder))
    drawn = {
        row: torch.stack(
            [
                image_to_float(decode_image((folder / entry["file"]).read_bytes()))
                for entry in report.pictures
                if entry["weights"] == weights
            ]
        )
        for weights, row in ROWS.items()
    }
    real = prompts.image * 2 - 1
    return {REAL: real, RECONSTRUCTION: reconstruct(real, model), **drawn}


@torch.no_grad()
def reconstruct(image: Tensor, model: str) -> Tensor:
    """What the VAE leaves of pictures."""
    family, vae = FAMILIES["flux2"], load_pipeline(MODELS[model], ["vae"]).vae.float()
    parts = torch.split(image, MADE_AT_ONCE)
    return torch.cat(
        [family.decode_latents(vae, family.encode_latents(vae, part)) for part in parts]
    )


def measure(pictures: dict[str, Tensor], prompts: Scenes) -> dict[str, Scores]:
    reference = make_scenes(range(NUM_REFERENCE), seed=REFERENCE_SEED, size=IMAGE_SIZE)
    judge = Measure(FeatureNet.load(METRICS_NET), reference.image)
    return {row: judge(image / 2 + 0.5, prompts.labels) for row, image in pictures.items()}


def check_gates(
    basis: BasisReport,
    conversion: ConvertReport,
    scores: dict[str, Scores],
    *,
    beats_its_base: bool = True,
) -> list[Gate]:
    """What the demo promises; to beat its base, only where the VAE is weak."""
    base, tuned = scores[ROWS["base"]], scores[ROWS["ema"]]
    texture = (base.accuracy_of["texture"], tuned.accuracy_of["texture"])
    parity = conversion.coupling.psnr if conversion.coupling else stored_parity(conversion.path)
    gates = [
        Gate(
            "sampling in pixels equals sampling in latents, above 100 dB",
            f"{parity:.1f} dB",
            parity > 100,
        ),
        Gate("held-out R2 of the basis above 0.6", f"{basis.r2:.3f}", basis.r2 > 0.6),
    ]
    if beats_its_base:
        gates += [
            Gate(
                "finetuned Frechet distance below half of the latent base's",
                f"{tuned.frechet:.1f} against {base.frechet:.1f}",
                tuned.frechet < base.frechet / 2,
            ),
            Gate(
                "textures read off the finetuned pictures more often than off the base's",
                f"{texture[1]:.3f} against {texture[0]:.3f}",
                texture[1] > texture[0],
            ),
        ]
    return gates


def stored_parity(lifted: Path) -> float:
    """The decibels that an earlier convert measured."""
    facts = json.loads((lifted / "transformer" / "asymlift.json").read_bytes())
    return float(facts["verification"]["coupling"]["psnr"])


HEADER = ("", "Frechet", "accuracy", "shape", "texture", "letter", "high frequencies")


def score_rows(
    scores: dict[str, Scores],
) -> list[tuple[str, float, float, float, float, float, float]]:
    return [
        (
            row,
            s.frechet,
            s.accuracy,
            s.accuracy_of["shape"],
            s.accuracy_of["texture"],
            s.accuracy_of["letter"],
            s.high_frequency,
        )
        for row, s in scores.items()
    ]


# ---- what is left to look at -------------------------------------------------------------------

METHOD = (
    "The lifted model starts as an exact copy of the latent one, seen through the basis; "
    "finetuning adds detail. All sampled rows start from the same noise."
)
ABOUT = {
    WEAK: "A tiny FLUX.2-type latent model of 32 x 32 scenes, ported to pixels on this machine. "
    "Its VAE is deliberately weak: it loses textures and letters, and no latent model can bring "
    f"back what its VAE throws away. {METHOD}",
    GOOD: "The same with a well-trained VAE, which throws little away: what a port gains here it "
    f"gains honestly, in few steps and against a base that had many more. {METHOD}",
}
READING = (
    "Frechet: distance between feature statistics of 256 pictures and of 2048 real scenes; lower "
    "is better, and real images do not reach 0 at this count. Accuracy: how often a judge network, "
    "which no loss has seen, reads the caption's words off the picture. High frequencies: spectral "
    "power above 0.3 of the Nyquist rate, real scenes = 1; finetuning need not raise it."
)


def write_report(
    report: DemoReport,
    recipe: Recipe,
    pictures: dict[str, Tensor],
    basis: BasisReport,
    conversion: ConvertReport,
    about: str,
) -> None:
    metrics = read_metrics(recipe.run_folder / "metrics.jsonl")
    grid = grid_png([(row, image[:SHOWN]) for row, image in pictures.items()], SCALE)
    write_bytes_atomically(report.folder / "compare.png", grid)
    base, tuned = report.scores[ROWS["base"]], report.scores[ROWS["ema"]]
    headline = numbers(
        [
            (f"{base.frechet:.0f} -> {tuned.frechet:.0f}", "Frechet distance", "base -> finetuned"),
            (f"{base.accuracy:.2f} -> {tuned.accuracy:.2f}", "accuracy", "base -> finetuned"),
            (f"{basis.r2:.2f}", "held-out R2", "how well latents match pixels"),
        ]
    )
    gates = [(gate.promise, gate.found, "kept" if gate.kept else "BROKEN") for gate in report.gates]
    sections = [
        ("", paragraph(about) + headline),
        ("Side by side", picture(grid, "The first prompts; every row from the same noise.")),
        ("Scores", table(score_rows(report.scores), HEADER) + paragraph(READING)),
        ("Promises", table(gates, ("promise", "found", ""))),
        ("Basis and conversion", "".join(map(paragraph, told(basis, conversion)))),
        *curve_sections(metrics),
        ("Seconds", table(list(report.seconds.items()))),
    ]
    write_bytes_atomically(report.page, page("asymlift demo", sections).encode())
    facts = {
        "scores": {row: asdict(scores) for row, scores in report.scores.items()},
        "gates": [asdict(gate) for gate in report.gates],
        "seconds": report.seconds,
    }
    write_bytes_atomically(report.folder / "demo.json", canonical_json(facts))


def told(basis: BasisReport, conversion: ConvertReport) -> list[str]:
    return [*describe_basis(basis), *describe_conversion(conversion)]


def show(report: DemoReport, *, as_json: bool) -> None:
    """The table, the gates, and where to look."""
    if as_json:
        log.print_json(asdict(report))
        return
    from rich.console import Console
    from rich.table import Table

    shown = Table(*HEADER, box=None, pad_edge=False)
    for row, *values in score_rows(report.scores):
        shown.add_row(row, f"{values[0]:.1f}", *(f"{value:.3f}" for value in values[1:]))
    if not log.console.quiet:
        Console(stderr=True, width=max(log.console.width, TABLE_WIDTH)).print(shown)
    for gate in report.gates:
        log.say(f"{'ok    ' if gate.kept else 'BROKEN'} {gate.promise}: {gate.found}")
    total = sum(report.seconds.values())
    parts = ", ".join(f"{name} {value:.0f}" for name, value in report.seconds.items())
    log.say(f"{total:.0f} s ({parts})")
    log.say(f"look at {report.page} and {report.folder / 'compare.png'}")
    sys.stderr.flush()


def broken(report: DemoReport) -> list[Any]:
    return [gate for gate in report.gates if not gate.kept]
