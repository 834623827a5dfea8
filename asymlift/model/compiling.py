"""torch.compile of a transformer's repeated blocks, which are traced once per kind of block.

The reference branch runs the same blocks with adapters off and originals shown. Both are plain
attributes of modules, which dynamo's guards look at, so each branch gets a graph of its own.
"""

import importlib.util
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn

from asymlift.errors import Unavailable
from asymlift.model.trainable import repeated_blocks

# Graphs per kind of block: two branches, with and without gradients, a few sizes of picture and
# text. Beyond torch's own limit of 8 blocks would quietly run uncompiled.
MOST_GRAPHS = 64


def compile_blocks(net: nn.Module, device: torch.device, backend: str = "inductor") -> None:
    """Compile every block in place; names of parameters stay what they are."""
    if backend == "inductor":
        check_compiler(device)
    limits = torch._dynamo.config
    limits.recompile_limit = max(limits.recompile_limit, MOST_GRAPHS)
    for block in repeated_blocks(net).values():
        block.compile(backend=backend)


@contextmanager
def explaining_compiler() -> Iterator[None]:
    """Inside, what torch.compile stumbles over is an error that says how to do without it."""
    try:
        yield
    except Exception as error:
        if all(kind.__module__ != "torch._dynamo.exc" for kind in type(error).__mro__):
            raise
        said = str(error).strip().splitlines()[0][:200]
        raise Unavailable(
            f"finetune.compile: torch.compile failed ({said}); its compiler may have been killed, "
            "or have had no room to write.\nRun the same command again, or do without: "
            "--set finetune.compile=false"
        ) from error


def check_compiler(device: torch.device) -> None:
    """torch.compile fails inside the first step, and at length, if these are missing."""
    kind, variable, names = (
        ("C", "CC", ("gcc", "clang", "cc"))  # triton compiles its launchers
        if device.type == "cuda"
        else ("C++", "CXX", ("g++", "clang++", "c++"))
    )
    candidates = [os.environ[variable]] if os.environ.get(variable) else list(names)
    if not any(shutil.which(name) for name in candidates):
        raise Unavailable(
            f"finetune.compile: torch.compile needs a {kind} compiler, and there is none "
            f"(looked for {', '.join(candidates)}); install one, or set compile: false"
        )
    if device.type == "cuda" and importlib.util.find_spec("triton") is None:
        raise Unavailable(
            "finetune.compile: torch.compile needs triton on a GPU; run: pip install triton, "
            "or set compile: false"
        )
