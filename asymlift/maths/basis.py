"""The pixel subspace: fitted to latents or to pixels alone, its scale, and how well it aligns.

D pixel token width, d latent token width. Everything follows from `Moments`, in float64.
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from asymlift.maths.moments import Moments


def procrustes(moments: Moments) -> tuple[Tensor, Tensor]:
    """The orthonormal A (D, d) that maximises tr(A^T sum x z^T), and the singular values (d,)."""
    d, D = moments.cross.shape
    if d > D:
        raise ValueError(
            f"a latent token has {d} numbers and a pixel token only {D}: "
            "no orthonormal basis can hold it"
        )
    U, S, Vh = torch.linalg.svd(moments.cross, full_matrices=False)
    A: Tensor = (U @ Vh).T
    return A, S


def pca(moments: Moments, rank: int) -> tuple[Tensor, Tensor]:
    """The uncentred principal directions A (D, rank), and all eigenvalues (D,), largest first."""
    D = len(moments.gram)
    if not 0 <= rank <= D:
        raise ValueError(f"rank {rank} is not between 0 and the {D} numbers of a pixel token")
    eigenvalues, vectors = torch.linalg.eigh(moments.gram)
    return vectors.flip(1)[:, :rank], eigenvalues.flip(0)


def rotate_to_latents(A: Tensor, moments: Moments) -> Tensor:
    """The basis of the same subspace that aligns best with the latents: A (D, d) -> (D, d)."""
    U, _, Vh = torch.linalg.svd(moments.cross @ A)
    rotation: Tensor = (U @ Vh).T
    return A @ rotation


def random_basis(D: int, d: int, generator: torch.Generator) -> Tensor:
    """Orthonormal columns without any knowledge: what a fit must beat."""
    noise = torch.randn(D, d, dtype=torch.float64, generator=generator, device=generator.device)
    Q: Tensor = torch.linalg.qr(noise)[0]
    return Q


def norm_matched_scale(A: Tensor, moments: Moments) -> float:
    """The published s: A^T x and s z have the same energy."""
    return float((_captured_energy(A, moments) / moments.energy_z).sqrt())


def least_squares_scale(A: Tensor, moments: Moments) -> float:
    """The s that minimises sum ||A^T x - s z||^2."""
    return float(_agreement(A, moments) / moments.energy_z)


@dataclass(frozen=True)
class Alignment:
    """How well s z stands for A^T x.

    `captured` alone misleads: plain PCA captures the most energy and aligns worst.
    """

    r2: float  # 1 - ||A^T x - s z||^2 / ||A^T x||^2, uncentred, over all tokens
    captured: float  # ||A^T x||^2 / ||x||^2
    explained: float  # 1 - ||x - s A z||^2 / ||x||^2, which is captured * r2
    cosine: float  # between A^T x and z, over all tokens as one vector


def alignment(A: Tensor, s: float, moments: Moments) -> Alignment:
    """Score a basis and a scale on the tokens of `moments`, held out from the fit.

    What is a share of nothing is NaN: of tokens that are zero, or that A captures nothing of.
    """
    captured_energy = float(_captured_energy(A, moments))
    agreement = float(_agreement(A, moments))
    energy_x, energy_z = float(moments.gram.trace()), float(moments.energy_z)
    r2 = _share(2 * s * agreement - s**2 * energy_z, captured_energy)
    captured = _share(captured_energy, energy_x)
    cosine = _share(agreement, (captured_energy * energy_z) ** 0.5)
    return Alignment(r2=r2, captured=captured, explained=captured * r2, cosine=cosine)


def principal_angles(A: Tensor, B: Tensor) -> Tensor:
    """Angles between two subspaces in radians, smallest first; one per column of the smaller."""
    if A.shape[1] < B.shape[1]:
        A, B = B, A
    overlap = A.T @ B
    cosines = torch.linalg.svdvals(overlap)
    sines = torch.linalg.svdvals(B - A @ overlap).flip(0)
    return torch.atan2(sines, cosines)  # arccos alone cannot see angles below 1e-8


def _share(part: float, whole: float) -> float:
    return part / whole if whole > 0 else math.nan


def _captured_energy(A: Tensor, moments: Moments) -> Tensor:
    """sum ||A^T x||^2"""
    A = A.to(moments.gram)
    return (A * (moments.gram @ A)).sum()


def _agreement(A: Tensor, moments: Moments) -> Tensor:
    """sum <A^T x, z>"""
    return (A * moments.cross.T).sum()


def column_energy(A: Tensor, moments: Moments) -> Tensor:
    """The share of pixel energy along each column of A, (d,)."""
    return (A * (moments.gram @ A)).sum(0) / moments.gram.trace()
