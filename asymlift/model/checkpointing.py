"""Gradient checkpointing: blocks run again in the backward pass, so that little is kept."""

from functools import partial
from typing import Any

from torch.utils.checkpoint import checkpoint

from asymlift.model.trainable import repeated_blocks


def checkpoint_blocks(net: Any) -> None:
    """Switch it on, with a function that takes named arguments too, as HunyuanImage gives them.

    Where a class knows nothing of it, as Lumina-Next's does, its blocks are wrapped.
    """
    if net._supports_gradient_checkpointing:
        net.enable_gradient_checkpointing(_run_again)
        return
    for block in repeated_blocks(net).values():
        block.forward = partial(_run_again, block.forward)


def _run_again(block: Any, *args: Any, **kwargs: Any) -> Any:
    return checkpoint(block, *args, use_reentrant=False, **kwargs)
