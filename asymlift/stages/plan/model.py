"""The model that a recipe would train, without its weights: what a config and headers say."""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property, partial
from typing import Any

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

from asymlift.artifacts.diffusers_folder import DiffusersFolder
from asymlift.artifacts.lifted_folder import FACTS
from asymlift.artifacts.safetensors_stream import DTYPES
from asymlift.errors import UserError
from asymlift.families.base import Family, Geometry, Text
from asymlift.maths.color import ColorCode
from asymlift.maths.zero_memory import Device
from asymlift.model.footprint import StepFootprint, make_fake, measure_sampling, measure_step
from asymlift.model.loading import weightless_transformer
from asymlift.model.perceptual import Lpips, Perceptual
from asymlift.model.pixel_flow import PixelFlow
from asymlift.model.training_step import Batch, TrainingStep
from asymlift.recipe import FinetuneSection, Recipe
from asymlift.runtime.parameters import Trainable
from asymlift.stages.finetune.model import assemble_step
from asymlift.stages.locate import (
    base_folder,
    family_in,
    geometry_of,
    lifted_path,
    named_family,
)

FROZEN_DTYPE = torch.bfloat16  # of a model whose weights are not here


@dataclass(frozen=True)
class Blueprint:
    """A lifted model as its config describes it."""

    family: Family
    geometry: Geometry
    config: Mapping[str, Any]  # of the lifted transformer
    stored: Mapping[str, torch.dtype]  # empty: the weights are not here
    folder: DiffusersFolder
    source: str  # where this is from, for the reader

    def dtype_of(self, name: str) -> torch.dtype:
        """As the loader would find it: the two maps are stored in float32."""
        if name.rpartition(".")[0] in (*self.family.first_maps, self.family.last):
            return torch.float32
        return self.stored.get(name, FROZEN_DTYPE)

    @cached_property
    def file_bytes(self) -> dict[str, int]:
        """Bytes of the weights of every part of the pipeline, where its files are."""
        found = {}
        for name in self.folder.components:
            try:
                headers = self.folder.headers(name)
            except UserError:  # a tokenizer or a scheduler, or weights that are not here
                continue
            found[name] = sum(i.num_bytes for h in headers.values() for i in h.tensors.values())
        return found

    @property
    def encoder_bytes(self) -> int:
        """Of the VAE and the text encoders."""
        others = self.file_bytes.keys() - set(self.family.networks)
        return sum(self.file_bytes[name] for name in others)

    def text_shapes(self, length: int | None) -> dict[str, tuple[int, ...]]:
        return self.family.text_shapes(self.config, length)


def blueprint_of(recipe: Recipe) -> Blueprint:
    """From the lifted folder if it is there, otherwise from the base, whose channels change."""
    lifted = (lifted_path(recipe) / FACTS).is_file()
    path = lifted_path(recipe) if lifted else base_folder(recipe)
    folder = DiffusersFolder(path)
    config = folder.config("transformer")
    family = family_in(folder, named_family(recipe))
    geometry = geometry_of(folder, family)
    stored = stored_dtypes(folder)
    source = f"{path}{'' if lifted else ', as convert would lift it'}"
    if not stored:
        source += f"; no weights there, taken to be {str(FROZEN_DTYPE).removeprefix('torch.')}"
    plain = {name: value for name, value in config.items() if not name.startswith("_")}
    changed = plain | family.channels(geometry.pixel_channels)
    return Blueprint(family, geometry, changed, stored, folder, source)


def stored_dtypes(folder: DiffusersFolder) -> dict[str, torch.dtype]:
    try:
        headers = folder.headers("transformer")
    except UserError:
        return {}
    return {
        name: DTYPES[info.dtype][1] for h in headers.values() for name, info in h.tensors.items()
    }


@dataclass(frozen=True)
class Built:
    """A training step whose weights are fake, and what is known of them."""

    step: TrainingStep
    trainable: Trainable
    mode: FakeTensorMode
    perceptual: nn.Module | None
    blueprint: Blueprint
    settings: FinetuneSection

    @cached_property
    def roles(self) -> dict[str, int]:
        """Trained numbers by role."""
        found: dict[str, int] = {}
        for name, parameter in self.trainable.parameters.items():
            role = self.trainable.roles[name]
            found[role] = found.get(role, 0) + parameter.numel()
        return found

    @cached_property
    def frozen(self) -> dict[str, int]:
        """Bytes of what does not train: the trunk, and what only the reference uses."""
        trunk = originals = 0
        for name, tensor in [*self.step.named_parameters(), *self.step.named_buffers()]:
            if tensor.requires_grad:
                continue
            extra = ".original." in name or name.startswith("reference_copy.")
            size = tensor.numel() * tensor.element_size()
            trunk, originals = trunk + (not extra) * size, originals + extra * size
        return {"trunk": trunk, "originals": originals}


def build(recipe: Recipe, blueprint: Blueprint, settings: FinetuneSection) -> Built:
    """What `finetune` would build with these settings."""
    family, geometry = blueprint.family, blueprint.geometry
    lower = torch.bfloat16 if settings.precision == "bfloat16" else None
    mode = FakeTensorMode(allow_non_fake_inputs=True)

    def load() -> PixelFlow:
        dtype_of = blueprint.dtype_of if lower else lambda _: torch.float32
        config = blueprint.folder.path / "transformer/config.json"
        net = weightless_transformer(blueprint.config, family, dtype_of, config)
        basis = torch.empty(geometry.D, geometry.d, device="meta")
        return PixelFlow(net, family, geometry, basis, 1.0, lower)

    measure, net = weightless_perceptual(settings, mode)
    step, trainable = assemble_step(settings, family, load, color_of(recipe).decode, measure)
    make_fake(step, mode)
    return Built(step, trainable, mode, net, blueprint, settings)


def color_of(recipe: Recipe) -> ColorCode:
    """The recipe's colours; numbers that are still to be fitted take no other memory."""
    return ColorCode(recipe.color.space, (0.0, 0.0, 0.0), 1.0)


def weightless_perceptual(
    settings: FinetuneSection, mode: FakeTensorMode
) -> tuple[Perceptual | None, nn.Module | None]:
    use = settings.loss.perceptual
    if use is None:
        return None, None
    net: nn.Module
    if use.net == "embedded":
        from asymlift.embedded import PERCEPTUAL_NET
        from asymlift.embedded.nets import FeatureNet, perceptual_map

        net = FeatureNet.load(PERCEPTUAL_NET)
        make_fake(net, mode)
        return partial(perceptual_map, net), net
    with torch.device("meta"):
        net = Lpips(use.net)
    make_fake(net, mode)
    return net, net


def trace(
    built: Built, *, micro_batch: int, grid: tuple[int, int], length: int | None, device: Device
) -> StepFootprint:
    """One micro-batch, forward and backward."""
    return measure_step(
        built.step,
        lambda: empty_batch(built.blueprint, micro_batch, grid, length),
        micro_batch,
        device,
        built.mode,
    )


def trace_sampling(
    built: Built, *, batch: int, grid: tuple[int, int], length: int | None, device: Device
) -> int:
    """The highest of one evaluation while pictures are drawn."""
    return measure_sampling(
        built.step.student,
        lambda: empty_batch(built.blueprint, batch, grid, length),
        device,
        built.mode,
    )


def empty_batch(
    blueprint: Blueprint, size: int, grid: tuple[int, int], length: int | None
) -> Batch:
    geometry, num_tokens = blueprint.geometry, grid[0] * grid[1]
    return Batch(
        x0=torch.empty(size, num_tokens, geometry.D),
        z0=torch.empty(size, num_tokens, geometry.d),
        eps=torch.empty(size, num_tokens, geometry.D),
        sigma=torch.empty(size),
        weight=torch.empty(size),
        text=empty_text(blueprint, size, length),
        grid=grid,
    )


def empty_text(blueprint: Blueprint, size: int, length: int | None) -> Text:
    """Embeddings as the encoders make them: in the trunk's dtype, as long as they get."""
    shapes = blueprint.text_shapes(length)
    return blueprint.family.collate(
        [
            {name: torch.empty(shape, dtype=FROZEN_DTYPE) for name, shape in shapes.items()}
            for _ in range(size)
        ]
    )
