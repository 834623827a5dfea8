"""Pictures from prompts, by any of four weights and from matched noise: base, lifted, ema, raw.

    00000-ema.png ...    one picture per prompt, number and weights
    grid.png             one row per weights, when there are several
    index.json           prompt, seed, settings, fingerprints, and the sha256 of each picture

Noise depends on the seed, the prompt and the picture's number within its prompt: neither the batch
nor other prompts change a picture. Latents start from A^T of the same noise.

Guidance goes against the empty prompt, unless another is given. Where the base's own pipeline has a
second network for that (`Family.wordless`), base and lifted go against it; trained weights do not,
but against their own empty prompt, which `data.caption_dropout` trains: the second network knows
nothing of the detail outside the subspace, so guidance would take all of it for the prompt's doing,
and exaggerate it.
"""

import gc
import json
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from asymlift.artifacts.checkpoint import (
    EMA,
    KIND,
    STATE,
    TRAINABLE,
    Checkpoint,
    read_checkpoint,
)
from asymlift.artifacts.diffusers_folder import DiffusersFolder
from asymlift.artifacts.files import sha256_file, write_bytes_atomically
from asymlift.artifacts.lifted_folder import OF_BASE, Lifted, read_lifted
from asymlift.artifacts.manifest import NAME as MANIFEST
from asymlift.artifacts.manifest import canonical_json, digest_json, read_manifest
from asymlift.artifacts.safetensors_stream import load_tensors
from asymlift.data.order import derive
from asymlift.data.pictures import encode_png, float_to_image, image_to_float
from asymlift.data.reference_picture import Reference, read_reference
from asymlift.errors import BadData, BadRecipe, Unavailable
from asymlift.families import family_of_lifted
from asymlift.families.base import TRANSFORMER, Family, Geometry, Text, renorm_rule
from asymlift.families.references import check_references, reference_rule
from asymlift.families.text import without_words
from asymlift.model.loading import (
    embed_prompts,
    load_pipeline,
    load_pipeline_parts,
    load_transformer,
    text_parts,
)
from asymlift.model.painting import Canvas, Painter, latent_painter, pixel_painter
from asymlift.model.pixel_flow import LatentFlow, PixelFlow
from asymlift.model.sampling import SampleSettings, noise_levels
from asymlift.model.trained_weights import apply_trained
from asymlift.runtime import dist, log
from asymlift.stages.locate import base_shift_of, family_in, geometry_of
from asymlift.stages.sample_folder import GRID, Picture, SampleFolder, Weights, read_index
from asymlift.stages.sizes import Sizes

TRAINED = {"ema": EMA, "raw": TRAINABLE}  # weights -> their file in a checkpoint
BARRIER_SECONDS = 3600  # ranks finish apart by one batch, not more

Embeddings = dict[str, dict[str, Tensor]]  # prompt -> what the family's encoder made of it


@dataclass(frozen=True)
class SamplePlan:
    """What to draw, with what, and where it goes."""

    out: Path
    prompts: tuple[str, ...]
    height: int
    width: int
    weights: tuple[Weights, ...] = ("ema",)
    settings: SampleSettings = field(default_factory=SampleSettings)
    base: Path | None = None  # a diffusers folder
    lifted: Path | None = None  # what convert wrote
    checkpoint: Path | None = None  # one step-N/ folder
    family: str = "auto"
    seed: int = 0
    num_per_prompt: int = 1
    negative_prompt: str | None = None  # what guidance goes against, whatever the weights
    references: tuple[Path, ...] = ()  # pictures to go by, in this order, for every prompt
    text_length: int | None = None
    batch: int = 4
    device: str = "auto"
    precision: Literal["auto", "bfloat16", "float32"] = "auto"  # auto: bfloat16 on a GPU
    overwrite: bool = False


@dataclass(frozen=True)
class SampleReport:
    """What came of it. `num_drawn` is 0 when everything was there already."""

    folder: Path
    pictures: list[dict[str, Any]]  # as in index.json
    num_drawn: int
    grid: Path | None
    noise_levels: str  # in words: how many, the first, the last
    seconds: float


def sample(plan: SamplePlan) -> SampleReport:
    """Draw what is missing of the plan, on all ranks together."""
    began = time.monotonic()
    ranks = dist.discover()
    device = dist.device_for(ranks) if plan.device == "auto" else torch.device(plan.device)
    if plan.precision == "auto":
        plan = replace(plan, precision="bfloat16" if device.type == "cuda" else "float32")
    sources = Sources(plan)
    facts = check(plan, sources)
    folder = SampleFolder(plan.out, facts, list(pictures_of(plan)))
    if ranks.world > 1:
        dist.join(ranks, device, BARRIER_SECONDS)
    missing = folder.missing(overwrite=plan.overwrite)
    done = not missing and folder.is_complete()
    dist.barrier()  # every rank has looked before any of them writes
    if not done:
        if ranks.first:
            folder.claim(sources.origin, overwrite=plan.overwrite)
        dist.barrier()
        draw(plan, sources, missing[ranks.rank :: ranks.world], device)
        dist.barrier()
        if ranks.first:
            folder.finish(sources.origin, sources.label)
        dist.barrier()
    return SampleReport(
        folder=plan.out,
        pictures=read_index(plan.out)["pictures"],
        num_drawn=len(missing),
        grid=plan.out / GRID if folder.compares else None,
        noise_levels=facts["noise_levels"],
        seconds=time.monotonic() - began,
    )


def check(plan: SamplePlan, sources: "Sources | None" = None) -> dict[str, Any]:
    """Refuse what cannot be drawn, without drawing; the facts that decide what would be."""
    sources = sources or Sources(plan)
    sources.check()
    facts: dict[str, Any] = json.loads(canonical_json(describe(plan, sources)))
    return facts


# ---- what is sampled ---------------------------------------------------------------------------


class Sources:
    """The folders of a plan, opened when they are needed and checked against each other."""

    def __init__(self, plan: SamplePlan) -> None:
        self.plan = plan
        if not plan.prompts:
            raise BadRecipe("no prompts: give at least one, or a file with one per line")
        for place, kinds, remedy in (
            (plan.base, {"base"}, "give the base model's diffusers folder"),
            (plan.lifted, {"lifted", "ema", "raw"}, "run `asymlift convert` first"),
            (plan.checkpoint, {"ema", "raw"}, "run `asymlift finetune` first"),
        ):
            if place is None and (wanted := kinds & set(plan.weights)):
                raise Unavailable(f"weights {', '.join(sorted(wanted))}: not there; {remedy}")

    @cached_property
    def base(self) -> DiffusersFolder | None:
        return DiffusersFolder(self.plan.base) if self.plan.base else None

    @cached_property
    def lifted(self) -> Lifted | None:
        return read_lifted(self.plan.lifted) if self.plan.lifted else None

    @cached_property
    def checkpoint(self) -> Checkpoint | None:
        """Only what is sampled is verified: the optimizer's state may be ten times as large."""
        kinds = [weights for weights in self.plan.weights if weights in TRAINED]
        folder = self.plan.checkpoint
        if folder is None or not kinds:
            return None
        described = read_manifest(folder)
        if described.kind != KIND:
            raise BadData(f"{folder}: a {described.kind}, not a checkpoint")
        if "ema" in kinds and EMA not in described.files:
            raise Unavailable(
                f"{folder}: has no {EMA}, as the run kept no average; "
                "sample its weights of that step: --weights raw"
            )
        for name in (STATE, *(TRAINED[weights] for weights in kinds)):
            path = folder / name
            if not path.is_file() or sha256_file(path) != described.files[name][1]:
                raise BadData(f"{path}: missing, or its bytes have changed; use another step")
        return read_checkpoint(folder)

    @cached_property
    def pipeline(self) -> DiffusersFolder:
        """The folder that text encoders, VAE and scheduler are read from."""
        return DiffusersFolder(self.lifted.folder) if self.lifted else self._certain_base

    @cached_property
    def family(self) -> Family:
        name = self.plan.family
        if self.lifted:
            return family_of_lifted(self.lifted.family, name)
        return family_in(self.pipeline, name)

    @cached_property
    def geometry(self) -> Geometry:
        if self.lifted:
            return self.lifted.geometry
        return geometry_of(self._certain_base, self.family)

    @cached_property
    def references(self) -> list[Reference]:
        if not self.plan.references:
            return []
        rule, patch = reference_rule(self.family), self.geometry.pixel_patch
        check_references(self.family, self.pipeline.model_index)
        return [read_reference(path, rule, patch) for path in self.plan.references]

    @property
    def _certain_base(self) -> DiffusersFolder:
        assert self.base is not None
        return self.base

    def second(self, weights: Weights) -> str | None:
        """The component that guidance goes against, in place of a prompt."""
        name, plan = self.family.wordless, self.plan
        if name is None or plan.settings.guidance == 1 or plan.negative_prompt is not None:
            return None
        has_it = {
            "base": self.base is not None and self.base.has(name),
            "lifted": self.lifted is not None and name in self.lifted.networks,
        }
        return name if has_it.get(weights) else None

    def against(self, weights: Weights) -> str | None:
        """The prompt that guidance goes against; None where it is a network."""
        return None if self.second(weights) else self.plan.negative_prompt or ""

    @cached_property
    def fingerprints(self) -> dict[str, str]:
        """Of everything whose weights are used."""
        found = {}
        if self.base and "base" in self.plan.weights:
            found["base"] = self.base.fingerprint("transformer")
            found["base VAE"] = self.base.fingerprint("vae")
            if second := self.second("base"):
                found[f"base {second}"] = self.base.fingerprint(second)
        if self.lifted:
            found["lifted model"] = digest_json(self.lifted.facts)
        if self.checkpoint:
            found["checkpoint"] = f"sha256:{sha256_file(self.checkpoint.folder / MANIFEST)}"
        return found

    def check(self) -> None:
        """Refuse sizes that the model cannot draw, and folders of different models."""
        if self.plan.settings.renorm:
            renorm_rule(self.family)
        p = self.geometry.pixel_patch
        for name, given in (("height", self.plan.height), ("width", self.plan.width)):
            if given < p or given % p:
                nearest = max(p, round(given / p) * p)
                raise BadRecipe(
                    f"{name} {given}: this model's patches are {p} pixels wide, so sizes are "
                    f"multiples of {p}; the nearest is {nearest}"
                )
        sizes = Sizes.of(self.pipeline, self.family, self.geometry)
        sizes.check_drawn(self.plan.height, self.plan.width)
        if self.lifted:
            made = f"{self.plan.lifted}: lifted from"
            origin = self.lifted.fingerprints
            same(made, origin.get("base_transformer"), "base", self.fingerprints)
            if second := self.family.wordless:
                recorded = origin.get(f"{OF_BASE}{second}")
                same(made, recorded, f"base {second}", self.fingerprints)
            same(made, origin.get("vae"), "base VAE", self.fingerprints)
        if self.checkpoint:
            of_run = self.checkpoint.state.get("fingerprints", {}).get("lifted")
            same(f"{self.plan.checkpoint}: trained from", of_run, "lifted model", self.fingerprints)

    def noise_levels(self) -> Tensor:
        """Pixel noise levels; without a lifted model the base's own levels."""
        plan, settings = self.plan, self.plan.settings
        num_tokens = plan.height * plan.width // self.geometry.pixel_patch**2
        if self.lifted is None and settings.shift == "sqrt_pixels":
            settings = replace(settings, shift="base")
        return noise_levels(
            settings,
            height=plan.height,
            width=plan.width,
            s=self.lifted.s if self.lifted else 1.0,
            base_shift=base_shift_of(self.pipeline, self.family, num_tokens),
        )

    @property
    def origin(self) -> dict[str, Any]:
        """Worth knowing about the pictures, but not part of what they are."""
        given = {name: getattr(self.plan, name) for name in ("base", "lifted", "checkpoint")}
        given |= {f"reference {n}": path for n, path in enumerate(self.plan.references, start=1)}
        return {
            "paths": {name: str(path) for name, path in given.items() if path},
            "family": self.family.name,
            "torch": torch.__version__,
        }

    def label(self, weights: Weights) -> str:
        step = f"step {self.checkpoint.step}" if self.checkpoint else ""
        said = {
            "base": "latent base",
            "lifted": "lifted",
            "ema": f"finetuned\n{step}, average",
            "raw": f"finetuned\n{step}",
        }[weights]
        if self.family.wordless is None or self.plan.settings.guidance == 1:
            return said
        prompt = self.against(weights)  # rows of one grid differ in it
        return f"{said}\nagainst {'no words' if prompt is None else repr(prompt)}"


def same(owner: str, recorded: str | None, name: str, found: dict[str, str]) -> None:
    """What an artifact says it was made from has to be what is given; silence is allowed."""
    if recorded and name in found and recorded != found[name]:
        raise BadData(
            f"{owner} another {name} than the one given.\n"
            f"recorded {recorded}\ngiven    {found[name]}"
        )


def pictures_of(plan: SamplePlan) -> Iterator[Picture]:
    """By weights, then prompt, then number."""
    for weights in plan.weights:
        for position, prompt in enumerate(plan.prompts):
            for number in range(plan.num_per_prompt):
                index = position * plan.num_per_prompt + number
                file = f"{index:05d}-{weights}.png"
                yield Picture(file, weights, prompt, number, plan.seed)


def describe(plan: SamplePlan, sources: Sources) -> dict[str, Any]:
    """All that decides what the pictures look like: two runs with equal facts draw the same."""
    sigmas = sources.noise_levels()
    references = [reference.sha256 for reference in sources.references]
    return {
        "prompts": plan.prompts,
        "guidance_against": {weights: sources.against(weights) for weights in plan.weights},
        "text_length": plan.text_length,
        "seed": plan.seed,
        "num_per_prompt": plan.num_per_prompt,
        "height": plan.height,
        "width": plan.width,
        "weights": plan.weights,
        "precision": plan.precision,
        "settings": asdict(plan.settings),
        "noise_levels": f"{len(sigmas) - 1} from {sigmas[0]:.6f}, the last {sigmas[-2]:.4f}",
        "fingerprints": sources.fingerprints,
        **({"references": references} if references else {}),
    }


# ---- drawing -----------------------------------------------------------------------------------


def draw(
    plan: SamplePlan,
    sources: Sources,
    pictures: Sequence[Picture],
    device: torch.device,
) -> None:
    """Draw and write this rank's pictures, one set of weights in memory at a time.

    That is two networks where guidance goes against one of its own.
    """
    if not pictures:
        return
    guided = plan.settings.guidance != 1
    prompts = {p.prompt for p in pictures}
    if guided:
        negatives = (sources.against(picture.weights) for picture in pictures)
        prompts |= {prompt for prompt in negatives if prompt is not None}
    embeddings = encode_prompts(plan, sources, sorted(prompts), device)
    kinds = [weights for weights in plan.weights if any(p.weights == weights for p in pictures)]
    batches = {
        weights: list(batched([p for p in pictures if p.weights == weights], plan.batch))
        for weights in kinds
    }
    sigmas = sources.noise_levels()
    references = tuple(image_to_float(one.image).unsqueeze(0) for one in sources.references)
    canvas = Canvas(plan.height, plan.width, plan.seed, plan.settings, sigmas, references)
    total = plan.settings.steps * sum(map(len, batches.values()))
    with log.progress("sampling", total) as ticker:
        for weights in kinds:
            painter = load_painter(plan, sources, weights, canvas, device)
            negative = sources.against(weights)
            for batch in batches[weights]:
                text = collate(sources.family, [embeddings[p.prompt] for p in batch], device)
                null = None
                if guided and negative is not None:
                    null = collate(sources.family, [embeddings[negative]] * len(batch), device)
                elif guided:
                    null = without_words(text)
                noises = [derive(p.prompt, p.number) for p in batch]
                images = painter(noises, text, null, lambda step, x: ticker.tick())
                for picture, image in zip(batch, images, strict=True):
                    save(plan, picture, image)
            del painter
            free_memory(device)


def load_painter(
    plan: SamplePlan, sources: Sources, weights: Weights, canvas: Canvas, device: torch.device
) -> Painter:
    """Load one set of weights, ready to draw."""
    family, geometry, lifted = sources.family, sources.geometry, sources.lifted
    half = torch.bfloat16 if plan.precision == "bfloat16" else None
    # Without autocast the whole network has to be of one type.
    stored: Any = "stored" if half else torch.float32
    second = sources.second(weights)

    def load(folder: Path, component: str) -> nn.Module:
        return load_transformer(folder, family, dtype=stored, component=component)

    def latent(component: str) -> LatentFlow:
        assert plan.base is not None
        return LatentFlow(load(plan.base, component), family, geometry, half).to(device)

    def pixel(net: nn.Module) -> PixelFlow:
        assert lifted is not None
        return PixelFlow(net, family, geometry, lifted.A, lifted.s, half).to(device)

    if weights == "base":
        assert plan.base is not None
        vae = load_pipeline_parts(plan.base, ["vae"], library=family.library, dtype=torch.float32)[
            "vae"
        ]
        return latent_painter(
            latent(TRANSFORMER),
            vae.to(device),
            lifted,
            canvas,
            device,
            against=latent(second) if second else None,
        )
    assert lifted is not None
    net = load(lifted.folder, TRANSFORMER)
    if weights != "lifted":
        assert sources.checkpoint is not None
        trained = sources.checkpoint.folder / TRAINED[weights]
        apply_trained(net, load_tensors(trained), sources.checkpoint.state.get("lora"))
    against = pixel(load(lifted.folder, second)) if second else None
    return pixel_painter(pixel(net), lifted, canvas, against)


def encode_prompts(
    plan: SamplePlan, sources: Sources, prompts: Sequence[str], device: torch.device
) -> Embeddings:
    """Embed each prompt alone, so that it comes out the same whatever the others are."""
    parts = text_parts(sources.pipeline, sources.family)
    pipeline = load_pipeline(sources.pipeline.path, parts, family=sources.family).to(device)
    with torch.no_grad():
        found = {
            prompt: embed_prompts(sources.family, pipeline, [prompt], plan.text_length)[0]
            for prompt in prompts
        }
    del pipeline
    free_memory(device)
    return found


def collate(family: Family, samples: Sequence[dict[str, Tensor]], device: torch.device) -> Text:
    return family.collate([{k: t.to(device) for k, t in one.items()} for one in samples])


def save(plan: SamplePlan, picture: Picture, image: Tensor) -> None:
    if not image.isfinite().all():
        raise BadData(f"{picture.file}: the VAE's picture holds NaN or infinity: broken weights?")
    write_bytes_atomically(plan.out / picture.file, encode_png(float_to_image(image)))


def batched(pictures: Sequence[Picture], size: int) -> Iterator[Sequence[Picture]]:
    for start in range(0, len(pictures), size):
        yield pictures[start : start + size]


def free_memory(device: torch.device) -> None:
    """Give a GPU's memory back at once; elsewhere what is not used goes by itself."""
    if device.type == "cuda":
        gc.collect()
        torch.cuda.empty_cache()
