"""The reference branch: the model as converted, sharing the student's frozen weights.

Adapters are switched off, and every module that trains in full keeps a frozen original. Sharing
only the trunk would let the reference drift with the first map, the last map and the final norm.
"""

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn


class Twin(nn.Module):
    """A module that trains, and its frozen original for the reference branch."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.trained = module
        self.original = copy.deepcopy(module).requires_grad_(False)
        self.shows_original = False

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return (self.original if self.shows_original else self.trained)(*args, **kwargs)


@contextmanager
def as_reference(net: nn.Module) -> Iterator[None]:
    """Inside, `net` computes what it computed when it was converted, without gradients."""
    from peft.tuners.tuners_utils import BaseTunerLayer

    twins = [module for module in net.modules() if isinstance(module, Twin)]
    adapted = [module for module in net.modules() if isinstance(module, BaseTunerLayer)]
    try:
        for twin in twins:
            twin.shows_original = True
        for layer in adapted:
            layer.enable_adapters(False)
        with torch.no_grad():
            yield
    finally:
        for twin in twins:
            twin.shows_original = False
        for layer in adapted:
            layer.enable_adapters(True)
