"""Lets CPU-only torch import PyPI's torchvision, whose compiled operators are linked to CUDA.

Such a torchvision cannot load its library, and then fails on import: it describes operators that
nobody has declared. Their Python callers (box suppression) are of no use here, so a declaration
without an implementation is enough for the models that lpips, transformers and diffusers need.
"""

import importlib.util
import sys
from pathlib import Path
from typing import Any

import torch

SCHEMAS = (
    "nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
    "qnms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
)

_declared: list[Any] = []  # a library's operators vanish with it


def declare_missing_schemas() -> bool:
    """Declare the operators if torchvision is here without its own; return whether that was so."""
    if _declared or "torchvision" in sys.modules or _own_operators_load():
        return bool(_declared)
    library: Any = torch.library.Library("torchvision", "DEF")  # type: ignore[no-untyped-call]
    for schema in SCHEMAS:
        library.define(schema)
    _declared.append(library)
    return True


def _own_operators_load() -> bool:
    """Load torchvision's operators as it will do itself; no torchvision, nothing to declare."""
    spec = importlib.util.find_spec("torchvision")
    if spec is None or spec.origin is None:
        return True
    compiled = sorted(Path(spec.origin).parent.glob("_C.*"))
    operators: Any = torch.ops
    try:
        for path in compiled:
            operators.load_library(str(path))
    except OSError:
        return False
    return bool(compiled) and hasattr(operators.torchvision, "nms")
