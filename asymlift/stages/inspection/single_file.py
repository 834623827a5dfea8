"""Which family the weights in one file belong to, by the names and shapes of its tensors."""

import importlib
from collections.abc import Mapping
from fnmatch import fnmatchcase

import torch

from asymlift.artifacts.safetensors_stream import TensorInfo
from asymlift.families import FAMILIES
from asymlift.families.base import Family
from asymlift.runtime import third_party

# What diffusers calls the formats in which authors published their own files -> our family.
ORIGINAL = {
    "auraflow": "auraflow",
    "chroma": "chroma",
    "cosmos-2.0-t2i-14B": "cosmos",
    "cosmos-2.0-t2i-2B": "cosmos",
    "flux-2-dev": "flux2",
    "flux-3-image": "flux3",
    "flux-dev": "flux1",
    "flux-schnell": "flux1",
    "hidream": "hidream",
    "krea2": "krea2",
    "lumina2": "lumina2",
    "qwen-image-2.1": "qwenimage21",
    "sana": "sana",
    "sd3": "sd3",
    "sd35_large": "sd3",
    "sd35_medium": "sd3",
    "z-image-turbo": "zimage",
}
# Anima's own files hold its text conditioner too; diffusers takes them for Cosmos' or for nobody's.
CONDITIONER = "llm_adapter.embed.weight"
UNKNOWN = "v1"  # diffusers' answer where nothing is known, unless these tensors are there
OF_STABLE_DIFFUSION = "model.diffusion_model.input_blocks.0.0.weight"


def portability_of(
    tensors: Mapping[str, TensorInfo], class_name: object = None
) -> tuple[list[tuple[str, str]], bool]:
    """Rows for the reader, and whether a family is known; nothing for what is no transformer.

    class_name is what a config.json beside the file says, if there is one.
    """
    same_names = [
        family
        for family in FAMILIES.values()
        if class_name in (None, family.transformer) and _has_names_of(family, tensors)
    ]
    if same_names:
        how = "put it, with its config.json, into transformer/ beside the other parts of"
        return _rows(same_names, "tensors named as in diffusers", how), True
    if any(name.endswith(CONDITIONER) for name in tensors):
        anima = FAMILIES["anima"]
        return [
            ("family", f"{anima.name} (its authors' own format)"),
            (
                "can be ported",
                f"yes, from a whole pipeline folder: {anima.checkpoints[0]} is one, and diffusers' "
                "scripts/convert_anima_to_diffusers.py makes one of this file",
            ),
        ], True
    original = original_format(tensors)
    if original is None:
        return [], False
    if ORIGINAL.get(original) in FAMILIES:
        family = FAMILIES[ORIGINAL[original]]
        how = (
            f"load it with {family.transformer}.from_single_file(FILE, config=FOLDER/transformer), "
            "and save_pretrained it beside the other parts of"
        )
        return _rows([family], f"its authors' own format, {original}", how), True
    return [
        ("format", original),
        ("can be ported", f"no: no family for {original}; see `asymlift families`"),
    ], False


def original_format(tensors: Mapping[str, TensorInfo]) -> str | None:
    """What diffusers takes a file in its authors' own format for; None where it cannot tell."""
    third_party.prepare()
    known = importlib.import_module("diffusers.loaders.single_file_utils")
    shapes = {name: torch.empty(info.shape, device="meta") for name, info in tensors.items()}
    found = str(known.infer_diffusers_model_type(shapes))
    return None if found == UNKNOWN and OF_STABLE_DIFFUSION not in tensors else found


def _has_names_of(family: Family, tensors: Mapping[str, TensorInfo]) -> bool:
    paths = {name.removesuffix(".weight") for name in tensors if name.endswith(".weight")}
    maps = {*family.first_maps, family.last}
    return maps <= paths and all(
        any(fnmatchcase(path, pattern) for path in paths) for pattern in family.lora_targets
    )


def _rows(families: list[Family], kind: str, how: str) -> list[tuple[str, str]]:
    names = " or ".join(family.name for family in families)
    homes = (next(iter(family.checkpoints), f"a {family.pipelines[0]}") for family in families)
    said = f"yes, from a whole pipeline folder: {how} {' or '.join(homes)}"
    return [("family", f"{names} ({kind})"), ("can be ported", said)]
