"""demo: the whole method on the embedded tiny model, through the stages that a user runs.

    scenes -> shards -> fit-basis -> convert -> finetune -> sample -> measure -> report.html

It ends with a table, and fails when the port does not do what it promises (the gates).
"""

import json
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from importlib.resources import files
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from asymlift.artifacts.diffusers_folder import DiffusersFolder
from asymlift.artifacts.files import write_bytes_atomically, writing
from asymlift.artifacts.manifest import canonical_json
from asymlift.data.pictures import decode_image, float_to_image, image_to_float
from asymlift.data.records import Sample
from asymlift.data.table import index_path, load_table
from asymlift.data.writer import packed_sample, write_shard
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
from asymlift.report.training_report import curve_sections
from asymlift.runtime import log
from asymlift.stages.convert import ConvertReport
from asymlift.stages.plans import (
    SampleRequest,
    describe_basis,
    describe_conversion,
    run_convert,
    run_finetune,
    run_fit_basis,
    run_sample,
)

WEAK, GOOD = "tiny", "tiny-good-vae"  # the embedded models
TRAIN_SHARDS, SHARD_SAMPLES = 4, 1024
VALIDATION_SAMPLES = 256
NUM_PROMPTS = 256
NUM_REFERENCE = 2048  # real scenes that nothing was trained on
TRAIN_SEED, VALIDATION_SEED, PROMPT_SEED, REFERENCE_SEED = 0, 1, 99, 555
ENCODED_AT_ONCE = 128
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
            f"data.train={out}/shards/train/{{000000..{TRAIN_SHARDS - 1:06d}}}.tar",
            f"data.validation={out}/shards/validation/000000.tar",
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
    with timed(seconds, "shards"), writing(out):
        write_shards(out / "shards", model)
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
    report = DemoReport(out, out / "report.html", scores, gates, seconds)
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


def write_shards(folder: Path, model: str = WEAK) -> None:
    """Scenes with their captions, latents and text embeddings; shards made alike stay."""
    made = origin(model)
    jobs = [
        (folder / "train" / f"{number:06d}.tar", TRAIN_SEED, number * SHARD_SAMPLES, SHARD_SAMPLES)
        for number in range(TRAIN_SHARDS)
    ]
    jobs.append((folder / "validation" / "000000.tar", VALIDATION_SEED, 0, VALIDATION_SAMPLES))
    missing = [job for job in jobs if not is_made(job[0], made)]
    if not missing:
        log.say("   all there already")
        return
    encode = encoder(model)
    for path, seed, start, count in log.track(missing, "shards", len(missing)):
        scenes = make_scenes(range(start, start + count), seed=seed, size=IMAGE_SIZE)
        keys = [f"{seed}-{index:06d}" for index in range(start, start + count)]
        samples = (packed_sample(sample, "float16") for sample in encode(scenes, keys))
        write_shard(path, samples, made=made)


def is_made(path: Path, made: dict[str, Any]) -> bool:
    table = load_table(path, index_path(path))
    return table is not None and table.made == made and path.is_file()


def origin(model: str) -> dict[str, Any]:
    """What the samples come from, as `prepare` would say it."""
    folder, recipe = DiffusersFolder(MODELS[model]), load_recipe(recipe_file("tiny.yaml"))
    return {
        "family": "flux2",
        "resize": recipe.data.resize.model_dump(),
        "latents": "float16",
        "vae": folder.fingerprint("vae"),
        "text": "float16",
        "text encoders": folder.text_fingerprint(),
        "text length": recipe.model.text_length,
        "prompt": recipe.data.caption.source,
    }


Encode = Callable[[Scenes, Sequence[str]], Iterator[Sample]]


def encoder(model: str = WEAK) -> Encode:
    """The base's own VAE and text encoder, through its family, as for any model."""
    family, pipeline = FAMILIES["flux2"], load_pipeline(MODELS[model])
    text_length = load_recipe(recipe_file("tiny.yaml")).model.text_length
    known: dict[str, dict[str, Tensor]] = {}

    def text_of(captions: Sequence[str]) -> list[dict[str, Tensor]]:
        fresh = [text for text in dict.fromkeys(captions) if text not in known]
        if fresh:
            known.update(
                zip(fresh, family.encode_prompt(pipeline, fresh, text_length), strict=True)
            )
        return [known[text] for text in captions]

    @torch.no_grad()
    def encode(scenes: Scenes, keys: Sequence[str]) -> Iterator[Sample]:
        images = float_to_image(scenes.image * 2 - 1)
        captions = [caption(row) for row in scenes.labels]
        for start in range(0, len(scenes), ENCODED_AT_ONCE):
            part = slice(start, start + ENCODED_AT_ONCE)
            latents = family.encode_latents(pipeline.vae, image_to_float(images[part]))
            texts = text_of(captions[part])
            columns = (keys[part], images[part], captions[part], latents, texts)
            for key, image, words, latent, text in zip(*columns, strict=True):
                yield Sample(key, image, words, latent=latent, text=text)

    return encode


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
    parts = torch.split(image, ENCODED_AT_ONCE)
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
    metrics = log.read_metrics(recipe.run_folder / "metrics.jsonl")
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
