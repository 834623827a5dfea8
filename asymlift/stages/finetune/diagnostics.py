"""What a step tells: sums of its micro-batches, added up over the ranks, made into figures.

What no sample has anything to say about is left out.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from asymlift.maths.diagnostics import covariance_trace
from asymlift.runtime import dist

PER_SAMPLE = ("loss", "loss_flow", "loss_perceptual")  # means over the good samples
GRADIENT_TOTAL = "gradient_total"  # a whole matrix, of which the norm is all that is wanted


def add(sums: dict[str, Tensor], more: Mapping[str, Tensor]) -> None:
    """Add the sums of one micro-batch, in place."""
    for name, value in more.items():
        sums[name] = sums[name] + value if name in sums else value


def over_ranks(sums: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The sums over all ranks, flat, still on the device. Every rank has to call."""
    flat = torch.cat([value.double().flatten() for value in sums.values()])
    sizes = [value.numel() for value in sums.values()]
    pieces = dist.summed(flat).split_with_sizes(sizes)
    return {
        name: piece.square().sum().view(1) if name.startswith(GRADIENT_TOTAL) else piece
        for name, piece in zip(sums, pieces, strict=True)
    }


def on_host(sums: Mapping[str, Tensor]) -> dict[str, list[float]]:
    """As numbers. Here the host waits for the device, once."""
    numbers = iter(torch.cat(list(sums.values())).tolist())
    return {name: [next(numbers) for _ in range(len(value))] for name, value in sums.items()}


def figures(sums: Mapping[str, Sequence[float]], num_good: int) -> dict[str, Any]:
    """What is logged of a step that so many samples of all ranks took part in."""

    made: dict[str, Any] = {
        name: sums[name][0] / max(num_good, 1) for name in PER_SAMPLE if name in sums
    }
    made["loss_by_sigma"] = [
        value / count if count else None
        for value, count in zip(sums["loss_by_sigma"], sums["num_by_sigma"], strict=True)
    ]
    if "num_compared" in sums and num_good:
        [compared], [energy] = sums["num_compared"], sums["error_energy"]
        made["skipped_reference"] = 1 - compared / num_good
        if compared:
            made["control"] = sums["control"][0] / compared
        if energy:
            made["explained"] = 1 - sums["error_left"][0] / energy
    if "num_looked_at" in sums and num_good:
        made["skipped_perceptual"] = 1 - sums["num_looked_at"][0] / num_good
    return made | variances(sums, num_good)


def variances(sums: Mapping[str, Sequence[float]], num_good: int) -> dict[str, float]:
    """Of the last map's gradients over the samples of a measured step, with both targets.

    `gradient_snr` is the energy of their mean over that mean's own variance.
    """
    if "gradient_squares" not in sums or num_good < 2:
        return {}
    [square_of_sum] = sums[GRADIENT_TOTAL]
    variance, plain = (
        covariance_trace(
            sums[f"gradient_squares{target}"][0], sums[f"{GRADIENT_TOTAL}{target}"][0], num_good
        )
        for target in ("", "_plain")
    )
    made = {"gradient_variance": variance, "gradient_variance_plain": plain}
    if variance > 0 and plain > 0:
        made["gradient_variance_ratio"] = variance / plain
        made["gradient_snr"] = square_of_sum / num_good / variance
    return made
