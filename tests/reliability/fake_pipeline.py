"""A pipeline folder with the file layout and tensor names of FLUX.2, but only a few numbers.

No diffusers class could run it; convert needs none for the maps. Everything is made in
milliseconds: f = 2, C = 2, q = 2, so p = 4, d = 8, D = 48.
"""

import dataclasses
import json
from pathlib import Path

import torch
from torch import Tensor

from asymlift.artifacts.basis_file import Basis, save_basis
from asymlift.artifacts.diffusers_folder import DiffusersFolder
from asymlift.artifacts.safetensors_stream import save_tensors
from asymlift.families import FAMILIES
from asymlift.maths.basis import random_basis
from asymlift.maths.color import ColorCode
from asymlift.stages.convert import ConvertPlan

FAMILY = FAMILIES["flux2"]
SECOND = "unconditional_transformer"
TWO_NETWORKS = dataclasses.replace(FAMILY, wordless=SECOND)
INNER, PATCH, D, d = 16, 4, 48, 8
CARD = """---
license: other
license_name: a-license
tags: [text-to-image]
---
# A model

license: not this one
"""


def write_json(path: Path, value: object) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(value, indent=2, sort_keys=True) + "\n")


def transformer_tensors(seed: int) -> dict[str, Tensor]:
    """Names of a Flux2Transformer2DModel; both maps, and a block between them."""
    g = torch.Generator().manual_seed(seed)
    shapes = {
        "x_embedder.weight": (INNER, d),
        "transformer_blocks.0.attn.to_q.weight": (INNER, INNER),
        "transformer_blocks.0.attn.norm_q.weight": (INNER,),
        "proj_out.weight": (d, INNER),
    }
    return {k: torch.randn(shape, generator=g).bfloat16() for k, shape in shapes.items()}


def write_base(folder: Path, *, seed: int = 0, shards: int = 3, second: bool = False) -> Path:
    """Write the pipeline. With three shards, the maps are in the first and the last of them.

    A second network has other weights, and lies in one file.
    """
    index = {"_class_name": "Flux2KleinPipeline", "_diffusers_version": "0.42.1"}
    classes = {
        "scheduler": ["diffusers", "FlowMatchEulerDiscreteScheduler"],
        "text_encoder": ["transformers", "Qwen3ForCausalLM"],
        "transformer": ["diffusers", "Flux2Transformer2DModel"],
        "vae": ["diffusers", "AutoencoderKLFlux2"],
    }
    if second:
        classes[SECOND] = classes["transformer"]
    write_json(folder / "model_index.json", index | classes)
    (folder / "README.md").write_text(CARD)
    (folder / "LICENSE.txt").write_text("Do good.\n")
    write_json(folder / "scheduler/scheduler_config.json", {"shift": 3.0})
    write_json(folder / "text_encoder/config.json", {"hidden_size": 4})
    save_tensors(folder / "text_encoder/model.safetensors", {"embed.weight": torch.ones(4, 4)})
    vae = {"_class_name": "AutoencoderKLFlux2", "block_out_channels": [8, 8], "latent_channels": 2}
    write_json(folder / "vae/config.json", vae)
    weight = torch.randn(2, 2, generator=torch.Generator().manual_seed(seed + 1))
    save_tensors(folder / "vae/diffusion_pytorch_model.safetensors", {"decoder.weight": weight})
    config = {"_class_name": "Flux2Transformer2DModel", "in_channels": d, "out_channels": None}
    write_json(folder / "transformer/config.json", config)
    _write_weights(folder / "transformer", transformer_tensors(seed), shards)
    if second:
        write_json(folder / SECOND / "config.json", config)
        _write_weights(folder / SECOND, transformer_tensors(seed + 100), 1)
    return folder


def _write_weights(folder: Path, tensors: dict[str, Tensor], shards: int) -> None:
    stem, metadata = "diffusion_pytorch_model", {"format": "pt"}
    if shards == 1:
        save_tensors(folder / f"{stem}.safetensors", tensors, metadata)
        return
    names = list(tensors)
    weight_map = {}
    for shard in range(shards):
        file = f"{stem}-{shard + 1:05d}-of-{shards:05d}.safetensors"
        first, end = (len(names) * n // shards for n in (shard, shard + 1))
        weight_map |= dict.fromkeys(names[first:end], file)
        save_tensors(folder / file, {k: tensors[k] for k in names[first:end]}, metadata)
    size = sum(tensor.nbytes for tensor in tensors.values())
    index = {"metadata": {"total_size": size}, "weight_map": weight_map}
    write_json(folder / f"{stem}.safetensors.index.json", index)


def write_basis(path: Path, base: Path, *, seed: int = 0, **changes: object) -> Path:
    """Write a random basis that belongs to this base."""
    facts = {
        "method": "procrustes",
        "family": "flux2",
        "color": ColorCode("oklab", (0.56, 0.0, 0.01), 0.16),
        "vae_fingerprint": DiffusersFolder(base).fingerprint("vae"),
    }
    A = random_basis(D, d, torch.Generator().manual_seed(seed)).float().contiguous()
    save_basis(path, Basis(**{"A": A, "s": 0.7, "patch": PATCH, **facts, **changes}))
    return path


def fake_plan(
    folder: Path, *, seed: int = 0, shards: int = 3, second: bool = False, **changes: object
) -> ConvertPlan:
    """Write base and basis below `folder`, and return the plan that converts them."""
    base = write_base(folder / f"base-{seed}", seed=seed, shards=shards, second=second)
    basis = write_basis(folder / f"basis-{seed}.safetensors", base)
    plan = {"base": base, "basis": basis, "output": folder / "run" / "lifted", "verify": "maps"}
    family = TWO_NETWORKS if second else FAMILY
    return ConvertPlan(**{**plan, "family": family, **changes})


def snapshot(folder: Path) -> dict[str, bytes]:
    """Every file below a folder with its bytes."""
    return {
        path.relative_to(folder).as_posix(): path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }
