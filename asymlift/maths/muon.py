"""Muon's update: momentum, made orthogonal. Matrices are (rows, columns).

K. Jordan et al., Muon, 2024; the scale is that of J. Liu et al., arXiv:2502.16982.
"""

import math

from torch import Tensor

QUINTIC = (3.4445, -4.7750, 2.0315)  # published: steepest at 0, and stays near 1
STEPS = 5
ADAMW_RMS = 0.2  # what an entry of AdamW's update usually measures


def orthogonalize(matrix: Tensor, *, floor: float = 1e-7) -> Tensor:
    """Return about U V^T of the matrix U S V^T: every singular value comes near 1."""
    wide = matrix.shape[0] <= matrix.shape[1]
    x = matrix if wide else matrix.T
    x = x / x.norm().clamp(min=floor)  # no singular value is above 1
    a, b, c = QUINTIC
    for _ in range(STEPS):
        gram = x @ x.T
        x = a * x + (b * gram + c * gram @ gram) @ x
    result: Tensor = x if wide else x.T
    return result


def adamw_scale(rows: int, columns: int) -> float:
    """The factor that makes an orthogonal matrix as large as AdamW's update of it.

    Its entries have a root mean square of 1 / sqrt(max(rows, columns)); so one learning rate, and
    one weight decay, serve both optimizers.
    """
    return ADAMW_RMS * math.sqrt(max(rows, columns))
