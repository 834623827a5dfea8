"""What a recipe asks `prepare` for: its sources, its encoders, and what the shards will weigh."""

import re
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from asymlift.artifacts.diffusers_folder import DiffusersFolder
from asymlift.artifacts.files import free_bytes, human_bytes
from asymlift.data.buckets import suggestion
from asymlift.data.catalog import TOO_SMALL, expand
from asymlift.data.records import IMAGE_SUFFIXES, LATENT, BadSample, text_suffix
from asymlift.data.tar import BLOCK
from asymlift.errors import BadData, BadRecipe, CannotWrite, Unavailable
from asymlift.families.base import Family, Geometry
from asymlift.recipe import PrepareSection, Recipe
from asymlift.runtime.log import progress, say
from asymlift.stages.open_data import fit_of, reader_of
from asymlift.stages.prepare.shard import Embedding, Picture, ShardMaker, plain_members
from asymlift.stages.prepare.work import Work, find_work, plan_for
from asymlift.stages.sizes import Sizes

WEIGHED = 256  # pictures that the estimate is made from
WEIGHED_FIRST = 32  # of those, to begin with: enough to cut shards of about the size
ENCODED = 16  # of those; a latent's size follows from its picture's, an embedding's hardly varies
FEW = 0.1  # too small for each that is not: up to here nothing is suggested
MOST_LOOKED_AT = 1024  # where many cannot be used
INDEX_BYTES = 16, 20  # in the index beside a shard: of a sample, and of each of its parts


@dataclass(frozen=True)
class Estimate:
    """What shards will take, by what a few samples took."""

    num_pictures: int
    num_looked_at: int
    num_usable: int  # of those
    bytes_per_sample: dict[str, float]  # image, captions and facts, latent, text, tar and index
    per_sample: float
    total: float
    free: int
    buckets: dict[str, int] = field(default_factory=dict)  # "width x height" -> of those
    left_out: dict[str, int] = field(default_factory=dict)  # by reason, of those looked at
    not_listed: dict[str, int] = field(default_factory=dict)  # by reason, before any was looked at
    advice: str = ""  # what to change where many are too small


class Encoders:
    """The base's VAE and text encoders, loaded when they are first needed."""

    def __init__(
        self, base: Path, family: Family, text_length: int | None, device: torch.device
    ) -> None:
        self.base, self.family, self.device = base, family, device
        self.text_length = text_length

    @cached_property
    def vae(self) -> Any:
        from asymlift.model.loading import load_pipeline_parts

        library = self.family.library
        parts = load_pipeline_parts(self.base, ["vae"], library=library, dtype=torch.float32)
        vae = parts["vae"]
        return vae.requires_grad_(False).to(self.device)

    @cached_property
    def pipeline(self) -> Any:
        from asymlift.model.loading import load_pipeline

        pipeline = load_pipeline(self.base, family=self.family)
        for name, part in pipeline.components.items():
            if isinstance(part, torch.nn.Module) and name != "vae":
                part.to(self.device)
        return pipeline

    @torch.inference_mode()
    def latents(self, images: Tensor) -> Tensor:
        height, width = images.shape[2:]
        with enough_memory(f"{len(images)} pictures of {width} x {height}", self.device):
            return self.family.encode_latents(self.vae, images.to(self.device)).float().cpu()

    @torch.inference_mode()
    def texts(self, prompts: Sequence[str]) -> list[Embedding]:
        from asymlift.model.loading import embed_prompts

        with enough_memory(f"{len(prompts)} captions", self.device):
            return embed_prompts(self.family, self.pipeline, prompts, self.text_length)


@contextmanager
def enough_memory(what: str, device: torch.device) -> Iterator[None]:
    """An encoder that runs out of memory ends in what to change, not in a traceback."""
    try:
        yield
    except RuntimeError as error:
        on_cpu = "can't allocate memory" in str(error)
        if not (on_cpu or isinstance(error, torch.OutOfMemoryError)):
            raise
        raise Unavailable(
            f"{what} at once do not fit into the memory of {device}: choose a smaller "
            "prepare.batch; where one is too many already, smaller data.resize.sides or "
            "model.text_length"
        ) from None


class Job:
    """A recipe's preparation: what it reads, what it makes, and how."""

    def __init__(
        self,
        recipe: Recipe,
        base: Path,
        family: Family,
        geometry: Geometry,
        device: torch.device,
        *,
        look_only: bool = False,  # nothing is written
        check_stop: Callable[[], None] = lambda: None,  # raises where somebody asked to stop
    ) -> None:
        self.check_stop = check_stop
        self.recipe, self.settings = recipe, settings_of(recipe)
        self.out = Path(self.settings.out)
        refuse_nesting(self.settings, self.out)
        with progress("list pictures", 0) as ticker:

            def listed(count: int) -> None:
                check_stop()
                ticker.tick(count)

            self.work = find_work(recipe, listed, look_only=look_only)
        self.as_stored = keeps_sizes(recipe, self.work)
        self.fit = fit_of(recipe.data.resize, geometry.pixel_patch)
        check_sizes(recipe, base, family, geometry, self.work)
        self.encoders = Encoders(base, family, recipe.model.text_length, device)
        self.made = self.origin(base, family)
        with_latents, with_text = self.settings.latents != "none", self.settings.text != "none"
        self.maker = ShardMaker(
            self.settings,
            self.fit,
            reader_of(recipe.data),
            as_stored=self.as_stored,
            encode_latents=self.encoders.latents if with_latents else None,
            encode_texts=self.encoders.texts if with_text else None,
            workers=recipe.data.workers,
            check_stop=check_stop,
        )

    def origin(self, base: Path, family: Family) -> dict[str, Any]:
        """What the samples come from, for those who will read them."""
        folder, use, data = DiffusersFolder(base), self.settings, self.recipe.data
        made: dict[str, Any] = {"family": family.name, "resize": data.resize.model_dump()}
        if self.as_stored:
            assert self.work.made is not None
            made["resize"] = self.work.made["resize"]
        if use.latents != "none":
            made |= {"latents": use.latents, "vae": folder.fingerprint("vae")}
        if use.text != "none":
            encoders = folder.text_fingerprint(has_encoder=family.has_text_encoder)
            if encoders is None:
                for named in folder.text_nets:
                    folder.folder(named)  # named, but not there: that is what has to be said
                raise BadData(
                    f"{base}: has no text encoder; prepare.text: none leaves the embeddings out"
                )
            made |= {
                "text": use.text,
                "text encoders": encoders,
                "text length": self.recipe.model.text_length,
                "prompt": data.caption.source,
            }
        return made

    @cached_property
    def plan(self) -> dict[str, Any]:
        """Everything that the bytes of the shards follow from."""
        use = self.settings
        cut = {"shard_samples": use.shard_samples} if use.shard_samples else {}
        cut = cut or {"shard_bytes": use.shard_bytes}
        form = {"image": use.image, "quality": use.quality, "batch": use.batch}
        return plan_for({**self.made, **form, **cut}, self.work)

    def estimate(self, at_least: int = WEIGHED) -> Estimate:
        """Make a few samples, and weigh them."""
        looked, bad = 0, list[BadSample]()
        encoded, weighed = list[Picture](), list[Weighed]()
        while len(weighed) < at_least and looked < min(MOST_LOOKED_AT, len(self.work)):
            until = min(looked + at_least, len(self.work))
            records = [self.work.record(place) for place in range(looked, until)]
            for picture in self.maker.pictures(records, bad.append):
                encoded += [picture] if len(encoded) < ENCODED else []
                weighed.append(Weighed(picture))
            looked = until
        if not weighed:
            raise self.nothing_usable(bad)
        latent, text = self.encoded_sizes(encoded)
        found = [sample.parts(latent, text) for sample in weighed]
        parts = {name: sum(sizes[name] for sizes in found) / len(found) for name in found[0]}
        per_sample = sum(parts.values())
        buckets = Counter(f"{w} x {h}" for w, h in (sample.size for sample in weighed))
        return Estimate(
            num_pictures=len(self.work),
            num_looked_at=looked,
            num_usable=len(weighed),
            bytes_per_sample=parts,
            per_sample=per_sample,
            total=per_sample * len(self.work) * len(weighed) / looked,
            free=free_bytes(self.out),
            buckets=dict(buckets.most_common()),
            left_out=count_reasons(bad),
            not_listed=count_reasons(self.work.faults),
            advice=self.advice(bad, len(weighed)),
        )

    def encoded_sizes(self, pictures: Sequence[Picture]) -> tuple[float, float]:
        """(bytes of latent for a pixel, bytes of text for a prompt)."""
        latent = text = pixels = prompts = 0
        for picture, packed in zip(pictures, self.maker.packed(pictures), strict=True):
            latent += len(packed.members.get(LATENT, b""))
            text += sum(
                len(packed.members.get(text_suffix(number), b""))
                for number in range(len(picture.prompts))
            )
            pixels, prompts = pixels + packed.width * packed.height, prompts + len(picture.prompts)
        return latent / pixels, text / prompts

    def per_shard(self) -> int:
        """Samples per shard, by weight; refuses to begin what the disk cannot hold."""
        found = self.estimate(WEIGHED_FIRST)
        say(
            f"about {human_bytes(found.per_sample)} a sample, {human_bytes(found.total)} in all; "
            f"{human_bytes(found.free)} free"
        )
        family = self.encoders.family
        if family.heavy_text and self.settings.text != "none":
            say(
                f"{family.name} has heavy embeddings ({family.heavy_text}); with "
                "`prepare.text: none` captions are encoded while training instead"
            )
        if found.advice:
            usable = f"{found.num_usable} of {found.num_looked_at}"
            say(f"{usable} that were looked at can be used; {found.advice}")
        if found.total > found.free:
            raise CannotWrite(
                f"{self.out}: the shards will take about {human_bytes(found.total)}, but only "
                f"{human_bytes(found.free)} are free. Choose another prepare.out, or store less "
                "(prepare.text, prepare.latents)"
            )
        wanted = self.settings.shard_samples
        return wanted or max(1, round(self.settings.shard_bytes / found.per_sample))

    def nothing_usable(self, bad: Sequence[BadSample]) -> BadData:
        reasons = Counter(fault.reason for fault in bad)
        said = "; ".join(f"{reason}: {count}" for reason, count in reasons.most_common(3))
        lines = [f"{self.settings.source}: none of {len(bad)} pictures can be used ({said})"]
        if advice := self.advice(bad, 0):
            lines += [str(next(fault for fault in bad if fault.reason == TOO_SMALL)), advice]
        else:
            lines += [str(fault) for fault in bad[:2]]
        if reasons["no class label"]:
            lines.append("data.caption.labels says where classes come from: folder, or a column")
        return BadData("\n".join(lines))

    def advice(self, bad: Sequence[BadSample], num_usable: int) -> str:
        """What to change where more than a few are too small; else nothing."""
        sizes = [size_in(fault) for fault in bad if fault.reason == TOO_SMALL]
        return suggestion(sizes, self.fit) if len(sizes) > FEW * num_usable else ""


def count_reasons(bad: Sequence[BadSample]) -> dict[str, int]:
    """Reason -> samples, the most frequent first."""
    counts = Counter[str]()
    for fault in bad:
        counts[fault.reason] += fault.count
    return dict(counts.most_common())


class Weighed:
    """The sizes of a picture's parts, without the picture."""

    def __init__(self, picture: Picture) -> None:
        self.size = picture.width, picture.height
        self.plain = {suffix: len(data) for suffix, data in plain_members(picture).items()}
        self.num_prompts = len(picture.prompts)

    def parts(self, latent_per_pixel: float, text_per_prompt: float) -> dict[str, float]:
        """Bytes in a shard, by what they are for."""
        image = sum(size for suffix, size in self.plain.items() if suffix in IMAGE_SUFFIXES)
        latent = latent_per_pixel * self.size[0] * self.size[1]
        texts = {text_suffix(number): text_per_prompt for number in range(self.num_prompts)}
        sizes = {**self.plain, LATENT: latent, **texts}
        members = [round(size) for size in sizes.values() if size]
        tar = sum(BLOCK + -size % BLOCK for size in members)
        return {
            "image": image,
            "captions and facts": sum(self.plain.values()) - image,
            "latent": latent,
            "text": text_per_prompt * self.num_prompts,
            "tar and index": tar + INDEX_BYTES[0] + INDEX_BYTES[1] * len(members),
        }


def size_in(fault: BadSample) -> tuple[int, int]:
    """The (width, height) that a refusal begins with."""
    width, height = re.findall(r"\d+", fault.detail)[:2]
    return int(width), int(height)


def settings_of(recipe: Recipe) -> PrepareSection:
    if recipe.prepare is None:
        raise BadRecipe(
            "the recipe has no `prepare` section: say `source` (a folder, a table, shards) and "
            "`out` (the folder for the shards)"
        )
    return recipe.prepare


def refuse_nesting(settings: PrepareSection, out: Path) -> None:
    """Neither may what is written be read, nor what is read be written over."""
    named, place = expand(settings.source), out.resolve()
    for shard in named.shards:
        if shard.parent.resolve() == place:
            raise BadRecipe(f"prepare.out: {out} holds {shard.name} of the source; take another")
    for path in named.listings:
        folder = path.resolve() if path.is_dir() else path.parent.resolve()
        inside = path.is_dir() and place.is_relative_to(folder)
        if inside or place == folder:
            raise BadRecipe(f"prepare.out: {out} is inside the source {path}; put it elsewhere")


def check_sizes(recipe: Recipe, base: Path, family: Family, geometry: Geometry, work: Work) -> None:
    """Refuse what `finetune` could not show the model."""
    sizes = Sizes.of(DiffusersFolder(base), family, geometry)
    if not keeps_sizes(recipe, work):
        sizes.check_resize(fit_of(recipe.data.resize, geometry.pixel_patch))
        return
    for source in work.sources:
        whole = source.sizes[:, ::-1] // geometry.pixel_patch * geometry.pixel_patch
        sizes.check_stored(whole[whole.min(1) > 0].tolist(), str(source.path))


def keeps_sizes(recipe: Recipe, work: Work) -> bool:
    """Whether the source was prepared and its pictures stay as they are."""
    settings, asked = settings_of(recipe), "resize" in recipe.data.model_fields_set
    if work.made is None:
        if settings.image == "none":
            raise BadRecipe("prepare.image: none is for a source of shards that were prepared")
        return False
    same = not asked or work.made["resize"] == recipe.data.resize.model_dump()
    if settings.image == "none" and not same:
        raise BadRecipe(
            f"prepare.image: none keeps the pictures as they are, made with data.resize "
            f"{work.made['resize']}, but the recipe says {recipe.data.resize.model_dump()}: "
            "leave data.resize out"
        )
    return same
