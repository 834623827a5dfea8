"""Blockwise 8-bit codes: each block of numbers is a scale times entries of one table.

The table is sorted and ends in exactly 1. T. Dettmers et al., arXiv:2110.02861.
"""

import torch
from torch import Tensor
from torch.nn.functional import pad


def dequantize(codes: Tensor, scales: Tensor, table: Tensor, block: int) -> Tensor:
    """Flat codes -> flat numbers; the last block may be shorter."""
    return table[codes.long()] * scales.repeat_interleave(block)[: len(codes)]


def quantize(values: Tensor, table: Tensor, block: int) -> tuple[Tensor, Tensor]:
    """Flat numbers -> (codes, scales), so that `dequantize` gives the nearest numbers.

    Numbers that came out of `dequantize` with the same blocks come out of it again, to the bit.
    """
    blocks = pad(values, (0, -len(values) % block)).view(-1, block)
    boundaries = (table[:-1] + table[1:]) / 2
    peak = blocks.abs().amax(dim=1)
    best = torch.full_like(peak, torch.inf)
    codes = torch.zeros(blocks.shape, dtype=torch.uint8, device=values.device)
    scales = peak.clone()
    # A block whose largest number is negative was scaled by more than it shows: its smallest
    # entry is not -1. Rounding leaves a few candidates for the scale; the first exact one is it.
    wider = peak / -table[0] if table[0] < 0 else peak
    up, down = wider.new_tensor(torch.inf), wider.new_tensor(0.0)
    for scale in (peak, wider, wider.nextafter(up), wider.nextafter(down)):
        tried = torch.bucketize(blocks / scale.clamp(min=1e-38)[:, None], boundaries)
        error = (table[tried] * scale[:, None] - blocks).abs().amax(dim=1)
        first = (scale is peak) | ((error == 0) & (best > 0))
        codes = torch.where(first[:, None], tried.to(torch.uint8), codes)
        scales = torch.where(first, scale, scales)
        best = torch.where(first, error, best)
    return codes.flatten()[: len(values)], scales
