"""Previews while training: the same prompts and noise by the base, as lifted, and as of now.

Guidance goes against the empty prompt in every row: one network is in memory, and rows differ in
nothing but weights. So of a family with a second network for that (`Family.wordless`), `sample`
draws other pictures of the base and the lifted model.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as td
from torch import Tensor

from asymlift.artifacts.diffusers_folder import DiffusersFolder
from asymlift.artifacts.files import write_bytes_atomically, writing
from asymlift.artifacts.lifted_folder import Lifted
from asymlift.artifacts.manifest import canonical_json, digest_json
from asymlift.artifacts.parsing import read_small
from asymlift.data.pictures import decode_image, encode_png, float_to_image, image_to_float
from asymlift.errors import BadRecipe, CannotWrite, Exit, UserError
from asymlift.families.base import Family, Text, renorm_rule
from asymlift.families.text import text_to
from asymlift.model.evaluating import evaluating
from asymlift.model.loading import load_pipeline_parts, load_transformer
from asymlift.model.painting import Canvas, Painter, latent_painter, pixel_painter
from asymlift.model.pixel_flow import LatentFlow, PixelFlow
from asymlift.model.sampling import SampleSettings, noise_levels
from asymlift.recipe import Recipe, SampleSection
from asymlift.report.pictures import grid_png
from asymlift.runtime import dist, watch
from asymlift.runtime.dist import Ranks
from asymlift.runtime.log import complain, warn
from asymlift.stages.locate import base_folder, base_shift_of

if TYPE_CHECKING:
    from asymlift.stages.finetune.data import Encoders

LONGEST = 1 << 24  # bytes of a file of prompts
BASE, LIFTED = "base", "lifted"  # folders of the two rows that never change
SMALLEST_SIDE = 128  # pictures in a grid are enlarged to at least that


def read_prompts(prompts: list[str] | str, key: str) -> list[str]:
    """The recipe's own list, or one prompt per line of a file."""
    if isinstance(prompts, str):
        path = Path(prompts)
        if not path.is_file():
            raise BadRecipe(f"{key}: {path} is no file; give a list of prompts, or a text file")
        try:
            text = read_small(path, LONGEST).decode("utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise BadRecipe(f"{key}: {path} cannot be read as text: {error}") from None
        prompts = [line.strip() for line in text.splitlines() if line.strip()]
    if not prompts:
        raise BadRecipe(f"{key}: there are no prompts")
    return prompts


def settings_of(use: SampleSection) -> SampleSettings:
    """The recipe's `sample` section, as the samplers take it."""
    return SampleSettings(
        solver=use.solver,
        steps=use.steps,
        guidance=use.guidance,
        orthogonal=use.orthogonal,
        renorm=use.renorm,
        clamp=use.clamp,
        shift=use.shift,
    )


def canvas_of(recipe: Recipe, lifted: Lifted, family: Family) -> Canvas:
    """Size, noise and noise levels of the previews, as `sample` would have them."""
    use, drawn = recipe.finetune.preview, recipe.sample
    assert use is not None
    if drawn.renorm:
        renorm_rule(family)
    patch = lifted.geometry.pixel_patch
    for key, side in (("height", drawn.height), ("width", drawn.width)):
        if side % patch:
            raise BadRecipe(
                f"sample.{key} {side}: this model's patches are {patch} pixels wide, so sizes are "
                f"multiples of {patch}"
            )
    settings = replace(settings_of(drawn), steps=use.steps, guidance=use.guidance)
    num_tokens = drawn.height * drawn.width // patch**2
    sigmas = noise_levels(
        settings,
        height=drawn.height,
        width=drawn.width,
        s=lifted.s,
        base_shift=base_shift_of(DiffusersFolder(lifted.folder), family, num_tokens),
    )
    return Canvas(drawn.height, drawn.width, drawn.seed, settings, sigmas)


def grid_path(run_folder: Path, step: int) -> Path:
    """The grid of a step, which is written after its pictures."""
    return run_folder / "samples" / f"step-{step:06d}" / "grid.png"


def is_missing(recipe: Recipe, step: int) -> bool:
    """Whether a step's pictures are due and not there: the run ended between save and picture."""
    use, last = recipe.finetune.preview, recipe.finetune.steps
    due = use is not None and (step == last or (step < last and step % use.every == 0))
    return due and not grid_path(recipe.run_folder, step).exists()


class Previews:
    """Makes the same pictures again and again, and keeps the rows that never change."""

    def __init__(
        self,
        recipe: Recipe,
        lifted: Lifted,
        family: Family,
        ranks: Ranks,
        device: torch.device,
        encoders: Encoders,
    ) -> None:
        assert recipe.finetune.preview is not None
        self.every = recipe.finetune.preview.every
        self.prompts = read_prompts(recipe.finetune.preview.prompts, "finetune.preview.prompts")
        self.lifted, self.family, self.ranks, self.device = lifted, family, ranks, device
        self.canvas, self.batch = canvas_of(recipe, lifted, family), recipe.sample.batch
        self.texts, self.null_text = encoders.for_all(self.prompts), encoders.null_text
        self.folder = recipe.run_folder / "samples"
        if dist.first_does(ranks, lambda: self.read_row(BASE) is None):
            self.draw_base(recipe)

    @classmethod
    def begin(
        cls,
        recipe: Recipe,
        lifted: Lifted,
        family: Family,
        ranks: Ranks,
        device: torch.device,
        encoders: Encoders,
    ) -> Previews | None:
        """Encode the prompts and draw the base while its parts are loaded; None if not wanted."""
        if recipe.finetune.preview is None:
            return None
        return cls(recipe, lifted, family, ranks, device, encoders)

    def draw_base(self, recipe: Recipe) -> None:
        """The row of the latent base, once, from the noise that the pixel model sees."""
        try:  # of several machines one may not have it
            base = dist.all_do(self.ranks, lambda: base_folder(recipe))
        except UserError as missing:
            if missing.exit != Exit.UNAVAILABLE:
                raise
            warn(f"previews without the row of the base: {missing}")
            return
        paint = dist.all_do(self.ranks, lambda: self.base_painter(recipe, base))
        self.keep(BASE, self.drawn_by_all(paint))

    def base_painter(self, recipe: Recipe, base: Path) -> Painter:
        full = recipe.finetune.precision == "float32"
        net = load_transformer(base, self.family, dtype=torch.float32 if full else "stored")
        precision = None if full else torch.bfloat16
        flow = LatentFlow(net.to(self.device), self.family, self.lifted.geometry, precision)
        library = self.family.library
        vae = load_pipeline_parts(self.lifted.folder, ["vae"], library=library)["vae"]
        return latent_painter(flow, vae.to(self.device), self.lifted, self.canvas, self.device)

    @torch.no_grad()
    def show(self, step: int, flow: PixelFlow) -> None:
        """Make this step's pictures. Every rank has to call."""
        with evaluating(flow):
            images = self.drawn_by_all(pixel_painter(flow, self.lifted, self.canvas))
        if step == 0:
            self.keep(LIFTED, images)
        dist.first_does(self.ranks, lambda: self.write_or_tell(step, images))

    @torch.no_grad()
    def keep_lifted(self, flow: PixelFlow) -> None:
        """The row of the model as converted, where a run that goes on has none of these prompts."""
        if dist.first_does(self.ranks, lambda: self.read_row(LIFTED) is None):
            with evaluating(flow):
                self.keep(LIFTED, self.drawn_by_all(pixel_painter(flow, self.lifted, self.canvas)))

    @torch.no_grad()
    def rehearse(self, flow: PixelFlow) -> None:
        """Draw one batch in two steps, of which each takes as much memory as in a picture."""
        sigmas = self.canvas.sigmas
        canvas = replace(self.canvas, sigmas=sigmas[[0, len(sigmas) // 2, -1]])
        most = -(-len(self.texts) // self.ranks.world)
        with evaluating(flow):
            self.draw(pixel_painter(flow, self.lifted, canvas), range(min(self.batch, most)))

    def drawn_by_all(self, paint: Painter) -> Tensor:
        """The pictures of all prompts, on every rank; each draws its share."""
        # Every rank draws as many, or the ranks would part ways inside ZeRO-3.
        world, count = self.ranks.world, len(self.texts)
        mine = [(self.ranks.rank + world * i) % count for i in range(-(-count // world))]
        images = self.draw(paint, mine)
        together = [images]
        if world > 1:
            together = [torch.empty_like(images) for _ in range(world)]
            td.all_gather(together, images)
        return torch.stack(together, dim=1).flatten(0, 1)[:count]

    def keep(self, name: str, images: Tensor) -> None:
        dist.first_does(self.ranks, lambda: self.write_row(name, images))

    def draw(self, paint: Painter, indices: Sequence[int]) -> Tensor:
        """(n, 3, H, W) uint8 of these prompts."""
        drawn = []
        for start in range(0, len(indices), self.batch):
            chunk = indices[start : start + self.batch]
            watch.going_on(f"prompt {chunk[0] + 1} of {len(self.prompts)}")
            text = self.text([self.texts[i] for i in chunk])
            null_text = self.text([self.null_text] * len(chunk))
            drawn.append(float_to_image(paint(chunk, text, null_text, None)))
        return torch.cat(drawn)

    def text(self, samples: list[dict[str, Tensor]]) -> Text:
        return text_to(self.family.collate(samples), self.device)

    # ---- on disk -------------------------------------------------------------------------------

    def write_or_tell(self, step: int, images: Tensor) -> None:
        """Pictures that the disk refuses are no reason to lose the steps since the last save."""
        try:
            self.write(step, images)
        except (CannotWrite, OSError) as error:
            complain(f"{error}\ntraining goes on without the pictures of step {step}")

    def write(self, step: int, images: Tensor) -> None:
        """PNG files, an index, and a grid with the two constant rows above."""
        name = f"step-{step:06d}"
        self.write_row(name, images)
        rows = {"latent base": self.read_row(BASE), "lifted": self.read_row(LIFTED)}
        shown = [(label, row) for label, row in rows.items() if row is not None]
        if step > 0:
            shown.append((f"step {step}", images.cpu()))
        scale = max(1, SMALLEST_SIDE // min(self.canvas.height, self.canvas.width))
        grid = grid_png([(label, image_to_float(row)) for label, row in shown], scale)
        write_bytes_atomically(self.grid(step), grid)

    def grid(self, step: int) -> Path:
        return grid_path(self.folder.parent, step)

    def write_row(self, name: str, images: Tensor) -> None:
        folder = self.folder / name
        with writing(folder):
            folder.mkdir(parents=True, exist_ok=True)
            for number, image in enumerate(images.cpu()):
                write_bytes_atomically(folder / f"{number:04d}.png", encode_png(image))
            write_bytes_atomically(folder / "index.json", canonical_json(self.facts()))

    def read_row(self, name: str) -> Tensor | None:
        """A row made earlier with the same prompts and settings."""
        folder = self.folder / name
        index = folder / "index.json"
        if not index.exists() or index.read_bytes() != canonical_json(self.facts()):
            return None
        paths = [folder / f"{number:04d}.png" for number in range(len(self.texts))]
        if not all(path.is_file() for path in paths):
            return None
        return torch.stack([decode_image(path.read_bytes()) for path in paths])

    def facts(self) -> dict[str, Any]:
        return {
            "prompts": self.prompts,
            "seed": self.canvas.seed,
            "size": [self.canvas.height, self.canvas.width],
            "settings": asdict(self.canvas.settings),
            "lifted": digest_json(self.lifted.facts),
        }
