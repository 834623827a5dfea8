"""A recipe: one YAML file that describes a port from end to end.

Sections are frozen and refuse unknown keys. YAML is read without aliases, duplicate keys or
surprise types: `1e-4` is a number, `no` is a string, `1:30` is a string.
"""

import difflib
import re
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Annotated, Any, Literal, Self, get_args

import yaml
from pydantic import (
    AfterValidator,
    BaseModel,
    ConfigDict,
    Field,
    NonNegativeFloat,
    NonNegativeInt,
    PositiveFloat,
    PositiveInt,
    ValidationError,
    field_validator,
    model_validator,
)

from asymlift.errors import BadRecipe

Decay = Annotated[float, Field(ge=0, lt=1)]
Share = Annotated[float, Field(ge=0, le=1)]
Patterns = str | list[str]
LONGEST = 1 << 20  # bytes of a recipe


class Section(BaseModel):
    """A block of a recipe: unknown keys are errors, values never change after loading."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, allow_inf_nan=False)


class ModelSection(Section):
    """The latent model that is ported."""

    base: Annotated[
        str, Field(min_length=1)
    ]  # a diffusers folder, or `embedded:NAME` for a model inside the package
    family: str = "auto"  # a name, or package.module:FAMILY
    text_length: PositiveInt | None = None  # tokens per caption; None is the pipeline's own


class ResizeSection(Section):
    """The sizes that pictures are brought to: by `prepare`, or while training where nobody did."""

    sides: list[PositiveInt] = [1024]  # of squares; a picture takes the largest that it covers
    step: PositiveInt | None = None  # bucket sides are multiples of it; None: a 16th of the side
    max_aspect: Annotated[float, Field(ge=1)] = 2.0  # longer pictures are left out
    min_side: PositiveInt | None = None  # pictures with a shorter side are left out
    upscale: bool = False  # false: what covers no bucket is left out

    @field_validator("sides", mode="after")
    @classmethod
    def at_least_one(cls, sides: list[int]) -> list[int]:
        if not sides:
            raise ValueError("give at least one")
        return sides


class CaptionSection(Section):
    """What a picture is trained with."""

    source: Literal["caption", "label", "class"] = "caption"  # a class by number or by name
    choice: Literal["first", "random", "longest"] = "first"  # where a picture has several
    lines: bool = False  # every line of a .txt is a caption of its own
    labels: str | None = None  # where class labels come from: `folder`, or a column of the table

    @model_validator(mode="after")
    def labels_are_known(self) -> Self:
        if self.labels == "":
            raise ValueError("labels: `folder`, or the name of a column")
        return self


class DataSection(Section):
    """Shards, or a folder or table of pictures with captions."""

    train: Patterns
    validation: Patterns | None = None
    cache: Patterns | None = None  # shards with newer latents or embeddings of the same pictures
    mode: Literal["exact", "stream"] = "exact"  # stream: pipes and object stores, in loose order
    resize: ResizeSection = ResizeSection()
    caption: CaptionSection = CaptionSection()
    text: Literal["auto", "cached", "online"] = "auto"  # auto: cached where it is
    caption_dropout: Share = 0.0  # the published run drops none
    max_bad_fraction: Share = 0.01
    workers: NonNegativeInt = 4


Store = Literal["none", "float32", "float16", "bfloat16", "float8"]


class PrepareSection(Section):
    """Pictures with captions -> shards with cached latents and text embeddings."""

    source: Patterns  # a folder, a .jsonl, .csv or .parquet table, or shards
    out: Annotated[str, Field(min_length=1)]  # a folder; then data.train names it
    image: Literal["jpeg", "png", "webp", "none"] = "jpeg"  # where the source's bytes cannot stay;
    # none: only latents and embeddings are written, for pictures that data.cache goes with
    quality: Annotated[int, Field(ge=1, le=100)] = 95
    latents: Store = "float16"  # none: encoded while training
    text: Store = "bfloat16"
    shard_bytes: PositiveInt = 1_000_000_000  # about so many
    shard_samples: PositiveInt | None = None  # or exactly so many samples
    batch: PositiveInt = 8  # pictures, and captions, that are encoded at once

    @model_validator(mode="after")
    def writes_something(self) -> Self:
        if self.image == self.latents == self.text == "none":
            raise ValueError("image, latents and text are all none: nothing would be written")
        return self


class ColorSection(Section):
    """The colour space that the pixel model works in, affinely normalised (method, section 6)."""

    space: Literal["rgb", "oklab"] = "oklab"
    mean: tuple[float, float, float] | Literal["fit"] = (0.56, 0.0, 0.01)  # published, for Oklab
    std: PositiveFloat | Literal["fit"] = 0.16

    @model_validator(mode="before")
    @classmethod
    def lists_are_tuples(cls, values: Any) -> Any:
        if isinstance(values, dict) and isinstance(values.get("mean"), list):
            values = {**values, "mean": tuple(values["mean"])}
        return values

    @model_validator(mode="after")
    def fit_both_or_neither(self) -> Self:
        if (self.mean == "fit") != (self.std == "fit"):
            raise ValueError("mean and std are both numbers, or both `fit`")
        return self


class BasisSection(Section):
    """How the pixel subspace is found. Patch, rank, D and d come from the checkpoint."""

    method: Literal["procrustes", "pca"] = "procrustes"
    images: PositiveInt = 1000  # as published
    holdout: PositiveInt = 200
    tokens_per_image: PositiveInt | None = None  # None: all of them


class LoraSection(Section):
    """Low-rank adapters on the frozen trunk. Published: rank 256, alpha 256, dropout 0.05."""

    rank: PositiveInt = 256
    alpha: PositiveFloat = 256.0
    dropout: Annotated[float, Field(ge=0, lt=1)] = 0.05
    targets: Literal["family"] | list[str] = "family"  # module paths; `*` stands for anything


class TrainSection(Section):
    """What trains: adapters, and modules that train in full."""

    lora: LoraSection | None = LoraSection()
    modules: list[str] = ["first", "last", "final_norm"]  # these words, or module paths

    @model_validator(mode="after")
    def trains_something(self) -> Self:
        if self.lora is None and not self.modules:
            raise ValueError("nothing trains: give `lora`, `modules`, or `train: full`")
        return self


PERCEPTUAL_NETS = Literal["vgg", "alex", "squeeze", "embedded"]


class PerceptualSection(Section):
    """The LPIPS correction. Weight 1 against a flow weight of 10, as published."""

    net: PERCEPTUAL_NETS = "vgg"
    weight: PositiveFloat = 1.0
    weights: str | None = None  # torchvision's file of the backbone; None: torch hub's cache
    # `random` is a choice that has to be made by name: random features teach nothing

    @model_validator(mode="after")
    def embedded_brings_its_weights(self) -> Self:
        if self.net == "embedded" and self.weights is not None:
            raise ValueError("net `embedded` brings its own weights: leave `weights` out")
        return self


class LossSection(Section):
    """Flow matching, with the control variate and the perceptual correction (method, section 5)."""

    kind: Literal["variance_reduced", "flow"] = "variance_reduced"
    reference: Literal["shared", "copy"] = "shared"  # `copy` holds the whole model twice
    shift: PositiveFloat = 0.3  # h: how fast the correction fades with noise
    weight: PositiveFloat = 10.0
    sigma_clamp: PositiveFloat = 0.05
    control_floor: PositiveFloat = 1e-4
    skip_below: Share = 0.0  # samples that a pass weighs less on are left out of it
    student_floor: PositiveFloat = 1e-6
    reference_floor: PositiveFloat = 1e-4
    perceptual: PerceptualSection | None = PerceptualSection()


class TimeSection(Section):
    """How noise levels are drawn. Published: shift 17 at one megapixel."""

    kind: Literal["logit_normal", "uniform", "mode"] = "logit_normal"
    shift: PositiveFloat = 17.0
    mean: float = 0.0
    std: PositiveFloat = 1.0
    mode_scale: float = 1.29  # of `mode` only
    per_resolution: bool = False  # `shift` is that of 1024 x 1024, and grows with the side
    stratified: bool = False  # the levels of a global batch are spread evenly


class OptimizerSection(Section):
    """AdamW, as published but in 32 bits; Muon takes the matrices, and leaves AdamW the rest."""

    kind: Literal["adamw", "adamw_8bit", "muon"] = "adamw"
    lr: PositiveFloat = 1e-4
    betas: tuple[Decay, Decay] = (0.9, 0.95)
    eps: PositiveFloat = 1e-8
    weight_decay: NonNegativeFloat = 0.0
    momentum: Decay = 0.95  # of `muon` only
    lr_scale: dict[str, PositiveFloat] = {"last": 10.0}  # by the words of `train.modules`, or lora

    @model_validator(mode="before")
    @classmethod
    def lists_are_tuples(cls, values: Any) -> Any:
        if isinstance(values, dict) and isinstance(values.get("betas"), list):
            values = {**values, "betas": tuple(values["betas"])}
        return values


class ScheduleSection(Section):
    """The learning rate over the run, a pure function of the step."""

    kind: Literal["constant", "linear", "cosine"] = "constant"
    warmup: NonNegativeInt = 100
    decay_from: Share = 0.0  # `linear` and `cosine` fall from this share of the run on
    floor: Share = 0.0  # the last learning rate, as a share of the first


class ClipSection(Section):
    """Gradient clipping by the global norm."""

    norm: PositiveFloat = 200.0
    from_step: NonNegativeInt = 100


class EmaSection(Section):
    """Average of what trains, in float32. Karras: (1 - 1/(n+1))^(gamma+1) after `from_step`."""

    kind: Literal["karras", "constant"] = "karras"
    gamma: PositiveFloat = 7.0
    decay: Annotated[float, Field(gt=0, lt=1)] = 0.999
    from_step: NonNegativeInt = 100
    shard: Literal["auto", "always", "never"] = "auto"  # over the ranks; auto: if it is large


class ZeroSection(Section):
    """DeepSpeed ZeRO: 0 plain data parallel, 1 optimizer, 2 and gradients, 3 and weights."""

    stage: Annotated[int, Field(ge=0, le=3)] = 2
    offload: Literal["none", "optimizer", "all"] = "none"  # to the host; all: parameters too

    @model_validator(mode="after")
    def offload_has_something_to_move(self) -> Self:
        if self.offload == "optimizer" and self.stage == 0:
            raise ValueError("offload: optimizer needs stage 1, 2 or 3; stage 0 partitions nothing")
        if self.offload == "all" and self.stage != 3:
            raise ValueError("offload: all needs stage 3, which partitions the parameters")
        return self


class CheckpointSection(Section):
    """When training state is saved, and which saves stay."""

    every: PositiveInt = 250
    keep: PositiveInt = 2
    milestone: PositiveInt | None = 1000  # multiples of this stay for ever


class PreviewSection(Section):
    """Pictures while training: base, lifted and now, from the same noise."""

    every: PositiveInt = 250
    prompts: list[str] | str = ["a photograph of a cat on a wooden table"]  # or a text file
    steps: PositiveInt = 32
    guidance: NonNegativeFloat = 4.0


class ValidationSection(Section):
    """Held-out samples of `data.validation`, with fixed noise and noise levels."""

    every: PositiveInt = 250
    samples: PositiveInt = 64
    levels: PositiveInt = 8  # noise levels per sample, at the middles of equal shares


class FinetuneSection(Section):
    """One finetuning run."""

    seed: int = 0
    steps: PositiveInt = 15000
    batch: PositiveInt = 256  # global
    micro_batch: PositiveInt = 8  # per rank and forward
    precision: Literal["bfloat16", "float32"] = "bfloat16"
    gradient_checkpointing: bool = False
    compile: bool = False  # torch.compile of the transformer's blocks
    train: Literal["full"] | TrainSection = TrainSection()
    loss: LossSection = LossSection()
    time: TimeSection = TimeSection()
    optimizer: OptimizerSection = OptimizerSection()
    schedule: ScheduleSection = ScheduleSection()
    clip: ClipSection | None = ClipSection()
    ema: EmaSection | None = EmaSection()
    zero: ZeroSection = ZeroSection()
    checkpoint: CheckpointSection = CheckpointSection()
    preview: PreviewSection | None = None
    validation: ValidationSection | None = None
    variance_every: NonNegativeInt = 50  # steps between measurements of gradient variance; 0: none
    trackers: list[Literal["tensorboard", "wandb"]] = []  # beside metrics.jsonl
    max_skipped: PositiveInt = 5  # updates in a row without finite gradients, before it ends
    timeout: PositiveInt = 600  # seconds that a rank waits for the others

    @model_validator(mode="after")
    def batch_divides(self) -> Self:
        if self.batch % self.micro_batch:
            raise ValueError(
                f"batch {self.batch} is not a multiple of micro_batch {self.micro_batch}"
            )
        return self

    @model_validator(mode="after")
    def scales_name_what_trains(self) -> Self:
        modules = [] if self.train == "full" else self.train.modules
        known = list(dict.fromkeys(["first", "last", "final_norm", "lora", "trunk", *modules]))
        for role in self.optimizer.lr_scale:
            if role not in known:
                raise ValueError(
                    f"optimizer.lr_scale: `{role}` names no part of the model; use one of "
                    f"{', '.join(known)}"
                )
        return self

    @model_validator(mode="after")
    def options_go_together(self) -> Self:
        if self.optimizer.kind == "adamw_8bit" and self.zero.offload != "none":
            raise ValueError(
                "optimizer.kind: adamw_8bit saves memory on the device, and zero.offload "
                f"{self.zero.offload} keeps the optimizer off it; use kind: adamw"
            )
        if self.compile and self.zero.stage == 3:
            raise ValueError(
                "compile: at zero.stage 3 weights come and go inside the compiled blocks; "
                "use stage 0, 1 or 2, or compile: false"
            )
        return self

    @model_validator(mode="after")
    def muon_has_matrices(self) -> Self:
        outside = {"first", "last", "final_norm"}
        if (
            self.optimizer.kind == "muon"
            and self.train != "full"
            and outside.issuperset(self.train.modules)
        ):
            raise ValueError(
                "optimizer.kind: muon is for matrices inside the transformer's blocks, and none of "
                "them trains in full (adapters, the first and the last map take AdamW); use kind: "
                "adamw, train: full, or name modules of blocks in train.modules"
            )
        return self

    @field_validator("trackers", mode="after")
    @classmethod
    def each_tracker_once(cls, trackers: list[str]) -> list[str]:
        if len(set(trackers)) < len(trackers):
            raise ValueError("each tracker once")
        return trackers

    @model_validator(mode="after")
    def reference_exists(self) -> Self:
        reduced = self.loss.kind == "variance_reduced"
        if self.train == "full" and reduced and self.loss.reference == "shared":
            raise ValueError(
                "train: full leaves no frozen weights to share with the reference; set "
                "loss.reference: copy (holds the model twice) or loss.kind: flow"
            )
        if self.loss.reference == "copy" and (self.train != "full" or not reduced):
            raise ValueError(
                "loss.reference: copy is for train: full with loss.kind: variance_reduced; "
                "elsewhere the reference shares the frozen weights"
            )
        return self


class SampleSection(Section):
    """How pictures are made."""

    solver: Literal["euler", "heun", "unipc"] = "unipc"
    steps: PositiveInt = 38
    guidance: NonNegativeFloat = 4.0
    orthogonal: NonNegativeFloat = 1.0
    renorm: bool = False  # guidance keeps lengths, as the pipelines of Qwen-Image and others do
    clamp: bool = True
    shift: PositiveFloat | Literal["sqrt_pixels", "base"] = "sqrt_pixels"
    height: PositiveInt = 1024
    width: PositiveInt = 1024
    batch: PositiveInt = 4
    seed: int = 0

    @model_validator(mode="after")
    def guidance_is_tamed_once(self) -> Self:
        if self.renorm and self.orthogonal:
            raise ValueError("renorm: true takes the place of `orthogonal`; set orthogonal: 0")
        return self


def plain_name(name: str) -> str:
    if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]*", name):
        raise ValueError(f"`{name}` becomes a folder: use letters, digits, dot, dash, underscore")
    return name


class Recipe(Section):
    """A port from end to end; each command reads its part."""

    name: Annotated[str, AfterValidator(plain_name)]
    runs: str = "runs"  # the folder above runs/NAME
    model: ModelSection
    data: DataSection
    color: ColorSection = ColorSection()
    basis: BasisSection = BasisSection()
    finetune: FinetuneSection = FinetuneSection()
    sample: SampleSection = SampleSection()
    prepare: PrepareSection | None = None

    @model_validator(mode="after")
    def validation_has_samples(self) -> Self:
        if self.finetune.validation is not None and self.data.validation is None:
            raise ValueError(
                "finetune.validation needs data.validation: samples that are not trained on"
            )
        return self

    @property
    def run_folder(self) -> Path:
        return Path(self.runs) / self.name


class StrictLoader(yaml.SafeLoader):
    """YAML 1.2's core types only; aliases and duplicate keys are errors."""

    yaml_implicit_resolvers: dict[str, list[tuple[str, re.Pattern[str]]]] = {}

    def compose_node(self, parent: Any, index: Any) -> Any:
        if self.check_event(yaml.AliasEvent):
            mark = self.peek_event().start_mark  # type: ignore[no-untyped-call]
            raise yaml.YAMLError(f"line {mark.line + 1}: aliases (*name) are not allowed")
        return super().compose_node(parent, index)

    def construct_mapping(self, node: Any, deep: bool = False) -> dict[Any, Any]:
        seen: set[Any] = set()
        for key_node, _ in node.value:
            key = self.construct_object(key_node, deep=True)
            if not isinstance(key, str):
                raise yaml.YAMLError(f"line {key_node.start_mark.line + 1}: key {key!r} is no word")
            if key in seen:
                raise yaml.YAMLError(f"line {key_node.start_mark.line + 1}: `{key}` is given twice")
            seen.add(key)
        return super().construct_mapping(node, deep)


for tag, pattern, first in [
    ("bool", r"true|false", "tf"),
    ("null", r"null|~|", "n~\0"),
    ("int", r"[-+]?[0-9]+", "-+0123456789"),
    ("float", r"[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)([eE][-+]?[0-9]+)?", "-+.0123456789"),
]:
    StrictLoader.add_implicit_resolver(
        f"tag:yaml.org,2002:{tag}", re.compile(rf"(?:{pattern})\Z"), list(first)
    )
StrictLoader.add_implicit_resolver("tag:yaml.org,2002:null", re.compile(r"\Z"), [""])
StrictLoader.add_constructor("tag:yaml.org,2002:int", lambda _, node: int(node.value))
StrictLoader.add_constructor("tag:yaml.org,2002:float", lambda _, node: float(node.value))


def load_recipe(path: Path, overrides: Iterable[str] = ()) -> Recipe:
    """Read a recipe and apply `section.key=value` overrides."""
    try:
        with path.open("rb") as file:  # which may be a pipe, but has to end
            data = file.read(LONGEST + 1)
        text = data.decode("utf-8")
    except FileNotFoundError:
        raise BadRecipe(f"{path}: no such recipe") from None
    except (OSError, UnicodeDecodeError) as error:
        raise BadRecipe(f"{path}: cannot be read: {error}") from None
    if len(data) > LONGEST:
        raise BadRecipe(f"{path}: more than {LONGEST} bytes, so no recipe; is the path right?")
    values = parse_yaml(text, str(path))
    if not isinstance(values, dict):
        raise BadRecipe(f"{path}: a recipe is a mapping of sections, not {type(values).__name__}")
    for override in overrides:
        apply_override(values, override)
    return check_recipe(values, str(path))


def check_recipe(values: dict[str, Any], source: str) -> Recipe:
    try:
        return Recipe.model_validate(values)
    except ValidationError as error:
        raise BadRecipe("\n".join(readable(error, source))) from None


def parse_yaml(text: str, source: str) -> Any:
    try:
        return yaml.load(text, StrictLoader)
    except (yaml.YAMLError, ValueError) as error:  # ValueError: a number of thousands of digits
        raise BadRecipe(f"{source}: {' '.join(str(error).split())}") from None
    except RecursionError:
        raise BadRecipe(f"{source}: nested too deeply to be a recipe") from None


def apply_override(values: dict[str, Any], override: str) -> None:
    """Set one value, in place; sections that are missing are made."""
    path, equals, text = override.partition("=")
    keys = path.strip().split(".")
    if not equals or not all(keys):
        raise BadRecipe(f"--set {override}: expected section.key=value")
    inner = values
    for key in keys[:-1]:
        if not isinstance(inner.get(key), dict):
            inner[key] = {}
        inner = inner[key]
    inner[keys[-1]] = parse_yaml(text, f"--set {override}")


def readable(error: ValidationError, source: str) -> Iterator[str]:
    """At most three lines, one per mistake."""
    mistakes = without_other_branches(error.errors())
    for mistake in mistakes[:3]:
        location = [str(part) for part in mistake["loc"] if not is_union_branch(str(part))]
        where = ".".join(location)
        if mistake["type"] == "extra_forbidden":
            yield f"{source}: unknown key `{where}`{suggestion(location)}"
        elif mistake["type"] == "missing":
            yield f"{source}: `{where}` is missing"
        else:
            said = mistake["msg"].removeprefix("Value error, ")
            if mistake["type"] == "model_type":  # pydantic's own words name our classes
                said = "input should be a section: keys with values"
            given = mistake["input"]
            shown = "" if isinstance(given, dict | BaseModel) else f" (given: {given!r})"
            yield f"{source}: {where + ': ' if where else ''}{said[0].lower()}{said[1:]}{shown}"
    if len(mistakes) > 3:
        yield f"{source}: and {len(mistakes) - 3} more"


def without_other_branches(mistakes: list[Any]) -> list[Any]:
    """Where a union was given a section with a mistake inside, only that mistake counts."""
    places = [tuple(p for p in m["loc"] if not is_union_branch(str(p))) for m in mistakes]
    return [
        mistake
        for mistake, place in zip(mistakes, places, strict=True)
        if not any(len(other) > len(place) and other[: len(place)] == place for other in places)
    ]


def is_union_branch(part: str) -> bool:
    """Pydantic names the member of a union in the location; a recipe has no such key."""
    return part.endswith("Section") or "[" in part or part in {"str", "float", "int"}


def suggestion(location: list[str]) -> str:
    """What the writer may have meant, among the keys of that section."""
    section: type[BaseModel] | None = Recipe
    for key in location[:-1]:
        if section is None or key not in section.model_fields:
            return ""
        section = section_of(section.model_fields[key].annotation)
    if section is None:
        return ""
    known = list(section.model_fields)
    close = difflib.get_close_matches(location[-1], known, n=1)
    return f"; did you mean `{close[0]}`?" if close else f"; known here: {', '.join(known)}"


def section_of(annotation: Any) -> type[BaseModel] | None:
    for choice in (annotation, *get_args(annotation)):
        if isinstance(choice, type) and issubclass(choice, BaseModel):
            return choice
    return None
