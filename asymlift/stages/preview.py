"""Previews while training: the same prompts and noise, as lifted and as the model is now."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.distributed as td
from torch import Tensor, nn

from asymlift.artifacts.files import write_bytes_atomically
from asymlift.artifacts.lifted_folder import Lifted
from asymlift.artifacts.manifest import canonical_json, digest_json
from asymlift.data.pictures import decode_image, encode_png, float_to_image, image_to_float
from asymlift.errors import BadRecipe
from asymlift.families.base import Family, Text
from asymlift.model.pixel_flow import PixelFlow
from asymlift.model.sampling import SampleSettings, noise_levels, pixel_noise, sample_pixels
from asymlift.recipe import Recipe
from asymlift.report.pictures import grid_png
from asymlift.runtime.dist import Ranks

LIFTED = "lifted"


def read_prompts(prompts: list[str] | str, key: str) -> list[str]:
    """The recipe's own list, or one prompt per line of a file."""
    if isinstance(prompts, str):
        path = Path(prompts)
        if not path.is_file():
            raise BadRecipe(f"{key}: {path} is no file; give a list of prompts, or a text file")
        prompts = [line.strip() for line in path.read_text("utf-8").splitlines() if line.strip()]
    if not prompts:
        raise BadRecipe(f"{key}: there are no prompts")
    return prompts


class Previews:
    """What is needed to make the same pictures again and again."""

    def __init__(
        self,
        recipe: Recipe,
        lifted: Lifted,
        family: Family,
        ranks: Ranks,
        device: torch.device,
        texts: list[dict[str, Tensor]],
        null_text: dict[str, Tensor],
        prompts: list[str],
    ) -> None:
        use = recipe.finetune.preview
        assert use is not None
        self.every, self.prompts = use.every, prompts
        self.lifted, self.family, self.ranks, self.device = lifted, family, ranks, device
        self.texts, self.null_text = texts, null_text
        self.height, self.width = recipe.sample.height, recipe.sample.width
        self.batch, self.seed = recipe.sample.batch, recipe.sample.seed
        self.folder = recipe.run_folder / "samples"
        self.settings = SampleSettings(
            solver=recipe.sample.solver,
            steps=use.steps,
            guidance=use.guidance,
            orthogonal=recipe.sample.orthogonal,
            clamp=recipe.sample.clamp,
            shift=recipe.sample.shift,
        )

    @classmethod
    def begin(
        cls,
        recipe: Recipe,
        lifted: Lifted,
        family: Family,
        ranks: Ranks,
        device: torch.device,
        encoders: Any,
    ) -> Previews | None:
        """Encode the prompts while the text encoder is loaded; None if no previews are wanted."""
        use = recipe.finetune.preview
        if use is None:
            return None
        prompts = read_prompts(use.prompts, "finetune.preview.prompts")
        patch = lifted.geometry.pixel_patch
        for key in ("height", "width"):
            if getattr(recipe.sample, key) % patch:
                raise BadRecipe(
                    f"sample.{key} {getattr(recipe.sample, key)}: no multiple of {patch}"
                )
        texts = encoders.captions(prompts)
        return cls(recipe, lifted, family, ranks, device, texts, encoders.null_text, prompts)

    @torch.no_grad()
    def show(self, step: int, flow: PixelFlow) -> None:
        """Make this step's pictures. Every rank makes its share."""
        # Every rank makes as many, or the ranks would part ways inside ZeRO-3.
        share = -(-len(self.texts) // self.ranks.world)
        mine = [(self.ranks.rank + self.ranks.world * i) % len(self.texts) for i in range(share)]
        with evaluating(flow):
            images = torch.cat([self.make(flow, chunk) for chunk in batches(mine, self.batch)])
        together = [images]
        if self.ranks.world > 1:
            together = [torch.empty_like(images) for _ in range(self.ranks.world)]
            td.all_gather(together, images)
        if self.ranks.first:
            ordered = torch.stack(together, dim=1).flatten(0, 1)[: len(self.texts)].cpu()
            self.write(step, ordered)

    def make(self, flow: PixelFlow, indices: list[int]) -> Tensor:
        patch = self.lifted.geometry.pixel_patch
        grid = (self.height // patch, self.width // patch)
        sigmas = noise_levels(
            self.settings, height=self.height, width=self.width, s=self.lifted.s, base_shift=1.0
        )
        image = sample_pixels(
            flow,
            pixel_noise(self.seed, indices, self.height, self.width, patch).to(self.device),
            self.text([self.texts[i] for i in indices]),
            self.text([self.null_text] * len(indices)),
            sigmas,
            self.settings,
            self.lifted.color,
            grid,
        )
        return float_to_image(image)

    def text(self, samples: list[dict[str, Tensor]]) -> Text:
        collated = self.family.collate(samples)
        return {
            name: value.to(self.device)
            if isinstance(value, Tensor)
            else [item.to(self.device) for item in value]
            for name, value in collated.items()
        }

    def write(self, step: int, images: Tensor) -> None:
        """PNG files, a grid with the row as lifted above, and an index."""
        if step == 0:
            self.write_row(self.folder / LIFTED, images)
        folder = self.folder / f"step-{step:06d}"
        self.write_row(folder, images)
        rows = [(f"step {step}", image_to_float(images))]
        before = self.read_row(self.folder / LIFTED)
        if before is not None and step > 0:
            rows.insert(0, ("lifted", image_to_float(before)))
        scale = max(1, 128 // min(self.height, self.width))
        write_bytes_atomically(folder / "grid.png", grid_png(rows, scale))

    def write_row(self, folder: Path, images: Tensor) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        for number, image in enumerate(images):
            write_bytes_atomically(folder / f"{number:04d}.png", encode_png(image))
        write_bytes_atomically(folder / "index.json", canonical_json(self.facts()))

    def read_row(self, folder: Path) -> Tensor | None:
        """A row made earlier with the same prompts and settings."""
        index = folder / "index.json"
        if not index.exists() or json.loads(index.read_bytes()) != self.facts():
            return None
        paths = [folder / f"{number:04d}.png" for number in range(len(self.texts))]
        return torch.stack([decode_image(path.read_bytes()) for path in paths])

    def facts(self) -> dict[str, Any]:
        return {
            "prompts": self.prompts,
            "seed": self.seed,
            "size": [self.height, self.width],
            "settings": vars(self.settings),
            "lifted": digest_json(self.lifted.facts),
        }


def batches(items: list[int], size: int) -> Iterator[list[int]]:
    for start in range(0, len(items), size):
        yield items[start : start + size]


@contextmanager
def evaluating(module: nn.Module) -> Iterator[None]:
    """Dropout off inside; each module's own mode comes back afterwards."""
    modes = [(part, part.training) for part in module.modules()]
    module.eval()
    try:
        yield
    finally:
        for part, mode in modes:
            part.training = mode
