"""What trains: adapters by exact module path, modules in full, or everything.

Everything that trains is float32. Roles name groups of parameters for learning rates: `first`,
`last`, `final_norm`, `lora`, `trunk`, or a module's own path.
"""

import difflib
import re
from dataclasses import dataclass

import torch
from torch import nn

from asymlift.errors import BadRecipe
from asymlift.families.base import Family, matching_modules, trained_in_full
from asymlift.model.reference import Twin
from asymlift.runtime.parameters import Trainable

ADAPTER = "default"  # peft's name for the one adapter


@dataclass(frozen=True)
class Adapters:
    """LoRA: which modules, and how wide."""

    rank: int
    alpha: float
    dropout: float
    targets: tuple[str, ...]  # patterns of module paths, `*` stands for anything


def plain_name(name: str) -> str:
    """The name without the wrappers of twins and adapters."""
    for wrapper in (".trained", ".base_layer", f".{ADAPTER}"):
        name = name.replace(f"{wrapper}.", ".")
    return name


def train_everything(net: nn.Module) -> Trainable:
    net.float().requires_grad_(True)
    names = dict(net.named_parameters())
    return Trainable(names, dict.fromkeys(names, "trunk"), matrices=block_matrices(net))


def train_parts(
    net: nn.Module,
    family: Family,
    *,
    adapters: Adapters | None,
    modules: list[str],
    keep_originals: bool,
    seed: int,
) -> Trainable:
    """Freeze `net` but for adapters and the named modules."""
    net.requires_grad_(False).eval()
    whole = whole_modules(modules, family, net)
    adapted = add_adapters(net, adapters, whole, seed) if adapters else []
    for path in whole:
        module = net.get_submodule(path).float().requires_grad_(True)
        if keep_originals:
            replace_module(net, path, Twin(module))
    trainable = Trainable(adapted=adapted, matrices=block_matrices(net))
    for name, parameter in net.named_parameters():
        if parameter.requires_grad:
            plain = plain_name(name)
            trainable.parameters[plain] = parameter
            trainable.roles[plain] = role_of(plain, whole)
    return trainable


def repeated_blocks(net: nn.Module) -> dict[str, nn.Module]:
    """Path -> block: what the outermost lists of a transformer hold."""
    blocks: dict[str, nn.Module] = {}
    for name, module in net.named_modules():
        inside = any(name.startswith(f"{path}.") for path in blocks)
        if isinstance(module, nn.ModuleList) and not inside:
            blocks |= {f"{name}.{number}": block for number, block in enumerate(module)}
    return blocks


def block_matrices(net: nn.Module) -> set[str]:
    """What Muon is for: the weights of linear maps inside the blocks that train in full.

    Not the first and the last map and the embedders, whose rows are unlike each other; and not
    LoRA's factors, whose product it would not make orthogonal.
    """
    return {
        plain_name(f"{path}.{name}")
        for path, block in repeated_blocks(net).items()
        for name, parameter in block.named_parameters()
        if parameter.requires_grad and parameter.ndim == 2 and ".lora_" not in name
    }


def role_of(name: str, whole: dict[str, str]) -> str:
    owners = [path for path in whole if name.startswith(f"{path}.")]
    return whole[max(owners, key=len)] if owners else "lora"


def whole_modules(modules: list[str], family: Family, net: nn.Module) -> dict[str, str]:
    """Path -> role of every module that trains in full; none may lie inside another."""
    whole: dict[str, str] = {}
    for role in modules:
        if role == "final_norm" and family.final_norm is None:
            continue
        path = path_of(role, family, net)
        for other in whole:
            outer, inner = sorted((other, path), key=len)
            if f"{inner}.".startswith(f"{outer}."):
                raise BadRecipe(
                    f"finetune.train.modules: `{inner}` would train twice, as "
                    f"`{whole[other]}` and as `{role}`; take one of them out"
                )
        whole[path] = role
    return whole


def path_of(role: str, family: Family, net: nn.Module) -> str:
    """The module that a word of `train.modules` stands for."""
    path = trained_in_full(family).get(role, role)
    existing = [name for name, _ in net.named_modules() if name]
    if path not in existing:
        raise BadRecipe(
            f"finetune.train.modules: `{path}` is no module of {type(net).__name__}"
            + nearest(path, existing)
        )
    return path


def nearest(path: str, existing: list[str]) -> str:
    close = difflib.get_close_matches(path, existing, n=1)
    return f"; did you mean `{close[0]}`?" if close else ""


def add_adapters(net: nn.Module, adapters: Adapters, whole: dict[str, str], seed: int) -> list[str]:
    """Put LoRA on the targets, in float32; A is Gaussian, B is zero, so nothing changes yet."""
    from peft import LoraConfig, inject_adapter_in_model

    targets = matching_modules(net, adapters.targets)
    if not targets:
        raise BadRecipe("finetune.train.lora.targets: the list is empty; `lora: null` trains none")
    for path in targets:
        owner = next((w for w in whole if path == w or path.startswith(f"{w}.")), None)
        if owner is not None:
            raise BadRecipe(
                f"finetune.train: `{path}` would train twice, as a LoRA target and inside "
                f"`{owner}`; take it out of lora.targets or modules"
            )
    config = LoraConfig(
        r=adapters.rank,
        lora_alpha=adapters.alpha,
        lora_dropout=adapters.dropout,
        init_lora_weights="gaussian",
        # A list would match suffixes too: `proj_out` alone hits every single block's.
        target_modules="|".join(re.escape(path) for path in targets),
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        inject_adapter_in_model(config, net, adapter_name=ADAPTER)
    for name, module in net.named_modules():
        if name.endswith((".lora_A", ".lora_B", ".lora_dropout")):
            module.float().train()
    return targets


def replace_module(net: nn.Module, path: str, module: nn.Module) -> None:
    parent, _, leaf = path.rpartition(".")
    owner = net.get_submodule(parent)
    if isinstance(owner, nn.ModuleDict):
        owner[leaf] = module
    else:
        setattr(owner, leaf, module)
