"""Gradient checkpointing: blocks run again in the backward pass, so that little is kept."""

from typing import Any

from torch.utils.checkpoint import checkpoint


def checkpoint_blocks(net: Any) -> None:
    """Switch it on, with a function that takes named arguments too, as HunyuanImage gives them."""
    net.enable_gradient_checkpointing(_run_again)


def _run_again(block: Any, *args: Any, **kwargs: Any) -> Any:
    return checkpoint(block, *args, use_reentrant=False, **kwargs)
