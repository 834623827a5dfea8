"""Position ids of pictures, as several families count them."""

import torch
from torch import Tensor


def grid_ids(h: int, w: int, *, axes: int = 3, device: torch.device | None = None) -> Tensor:
    """Return (h w, axes): row and column of each token on axes 1 and 2, zero on the others."""
    rows, columns = torch.meshgrid(
        torch.arange(h, device=device), torch.arange(w, device=device), indexing="ij"
    )
    ids = torch.zeros(h, w, axes, device=device)
    ids[..., 1], ids[..., 2] = rows, columns
    return ids.view(h * w, axes)
