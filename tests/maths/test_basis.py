import math

import pytest
import torch
from torch import Tensor
from torch.testing import assert_close

from asymlift.maths.basis import (
    alignment,
    column_energy,
    least_squares_scale,
    norm_matched_scale,
    pca,
    principal_angles,
    procrustes,
    random_basis,
    rotate_to_latents,
)
from asymlift.maths.moments import Moments

D, RANK, NUM_TOKENS = 12, 4, 60


@pytest.fixture
def tokens() -> tuple[Tensor, Tensor]:
    """Pixels off centre and with unequal directions; latents that partly follow them."""
    x = torch.randn(NUM_TOKENS, D) * torch.linspace(0.3, 2, D) + 0.5
    return x, x @ torch.randn(D, RANK) / 3 + torch.randn(NUM_TOKENS, RANK)


@pytest.fixture
def moments(tokens) -> Moments:
    x, z = tokens
    return Moments.zero(D, RANK).add(x, z, 1)


def some_basis(seed: int, rank: int = RANK) -> Tensor:
    return random_basis(D, rank, torch.Generator().manual_seed(seed))


def assert_orthonormal(A: Tensor) -> None:
    assert_close(A.T @ A, torch.eye(A.shape[1]), rtol=0, atol=1e-13)


def agreement(A: Tensor, x: Tensor, z: Tensor) -> float:
    """tr(A^T sum x z^T), token by token."""
    return sum(float((x_i @ A) @ z_i) for x_i, z_i in zip(x, z, strict=True))


def test_procrustes_agrees_with_the_latents_more_than_any_other_basis(tokens, moments):
    A, singular_values = procrustes(moments)
    assert_orthonormal(A)
    best = agreement(A, *tokens)
    assert best == pytest.approx(float(singular_values.sum()))
    for seed in range(200):
        assert agreement(some_basis(seed), *tokens) < best
        step = 0.01 * torch.randn(D, D)
        nearby = torch.linalg.matrix_exp(step - step.T) @ A
        assert agreement(nearby, *tokens) < best


def test_procrustes_finds_the_basis_that_made_the_pixels():
    true, z = some_basis(0), torch.randn(NUM_TOKENS, RANK)
    moments = Moments.zero(D, RANK).add(2.5 * z @ true.T, z, 1)
    A, _ = procrustes(moments)
    assert_close(A, true)
    assert norm_matched_scale(A, moments) == pytest.approx(2.5)
    assert least_squares_scale(A, moments) == pytest.approx(2.5)


def test_procrustes_stays_orthonormal_with_fewer_tokens_than_latent_numbers():
    moments = Moments.zero(D, RANK).add(torch.randn(2, D), torch.randn(2, RANK), 1)
    assert_orthonormal(procrustes(moments)[0])


def test_latents_wider_than_pixel_tokens_are_refused():
    with pytest.raises(ValueError, match="a latent token has 13 numbers and a pixel token only 12"):
        procrustes(Moments.zero(D, 13))


@pytest.mark.parametrize("rank", [0, 1, RANK, D])
def test_pca_is_the_uncentred_singular_value_decomposition_of_the_data(tokens, moments, rank):
    x, _ = tokens
    A, eigenvalues = pca(moments, rank)
    _, S, Vh = torch.linalg.svd(x, full_matrices=False)
    assert A.shape == (D, rank)
    assert_close(A @ A.T, Vh[:rank].T @ Vh[:rank])
    assert_close(eigenvalues, S.square())
    assert_close((x @ A).square().sum(0), S[:rank].square())


def test_a_rank_that_does_not_exist_is_refused(moments):
    for rank in (-1, 13):
        with pytest.raises(ValueError, match=f"rank {rank} is not between 0 and the 12"):
            pca(moments, rank)


def test_rotating_keeps_the_subspace_and_aligns_it_best(tokens, moments):
    x, z = tokens
    A, _ = pca(moments, RANK)
    rotated = rotate_to_latents(A, moments)
    assert_orthonormal(rotated)
    assert_close(rotated @ rotated.T, A @ A.T)
    best = agreement(rotated, x, z)
    for seed in range(200):
        rotation = random_basis(RANK, RANK, torch.Generator().manual_seed(seed))
        assert agreement(A @ rotation, x, z) < best


def test_the_published_scale_matches_energies(tokens, moments):
    x, z = tokens
    A = some_basis(1)
    s = norm_matched_scale(A, moments)
    assert_close((s * z).square().sum(), (x @ A).square().sum())


def test_the_least_squares_scale_has_the_smallest_residual(tokens, moments):
    x, z = tokens
    A, _ = procrustes(moments)
    solution = torch.linalg.lstsq(z.reshape(-1, 1), (x @ A).reshape(-1, 1)).solution
    assert least_squares_scale(A, moments) == pytest.approx(float(solution))


@pytest.mark.parametrize("s", [0.4, 1.7])
def test_alignment_equals_a_loop_over_tokens(tokens, moments, s):
    A = some_basis(2)
    residual = inside = total = unexplained = dot = latent = 0.0
    for x, z in zip(*tokens, strict=True):
        residual += float((x @ A - s * z).square().sum())
        inside += float((x @ A).square().sum())
        total += float(x.square().sum())
        unexplained += float((x - s * A @ z).square().sum())
        dot += float((x @ A) @ z)
        latent += float(z.square().sum())

    score = alignment(A, s, moments)

    assert score.r2 == pytest.approx(1 - residual / inside, abs=1e-12)
    assert score.captured == pytest.approx(inside / total, abs=1e-12)
    assert score.explained == pytest.approx(1 - unexplained / total, abs=1e-12)
    assert score.cosine == pytest.approx(dot / (inside * latent) ** 0.5, abs=1e-12)
    assert score.explained == score.captured * score.r2


def test_r2_is_twice_the_cosine_less_one_and_its_square_at_best(moments):
    A, _ = procrustes(moments)
    matched = alignment(A, norm_matched_scale(A, moments), moments)
    best = alignment(A, least_squares_scale(A, moments), moments)
    assert matched.r2 == pytest.approx(2 * matched.cosine - 1)
    assert best.r2 == pytest.approx(best.cosine**2)


def test_r2_runs_from_minus_three_to_one():
    true, z = some_basis(0), torch.randn(NUM_TOKENS, RANK)
    moments = Moments.zero(D, RANK).add(z @ true.T, z, 1)
    assert alignment(true, 1.0, moments).r2 == pytest.approx(1)
    assert alignment(-true, 1.0, moments).r2 == pytest.approx(-3)


def test_shares_of_nothing_are_not_a_number():
    """Black pictures, and a basis that captures nothing of what is there."""
    A, z = torch.eye(D, RANK, dtype=torch.float64), torch.ones(NUM_TOKENS, RANK)
    black = Moments.zero(D, RANK).add(torch.zeros(NUM_TOKENS, D), z, 1)
    outside = Moments.zero(D, RANK).add(torch.eye(D)[-1:].expand(NUM_TOKENS, D), z, 1)
    for moments, captured in ((black, math.nan), (outside, 0.0)):
        score = alignment(A, 1.0, moments)
        assert [score.r2, score.explained, score.cosine] == pytest.approx(
            [math.nan] * 3, nan_ok=True
        )
        assert score.captured == pytest.approx(captured, nan_ok=True)


def test_a_float32_basis_is_scored_in_float64(moments):
    A = some_basis(1)
    exact, rounded = (alignment(basis, 1.3, moments) for basis in (A, A.float()))
    assert rounded.r2 == pytest.approx(exact.r2, abs=1e-6)
    assert norm_matched_scale(A.float(), moments) == pytest.approx(norm_matched_scale(A, moments))


def test_principal_angles_are_those_the_basis_was_turned_by():
    """Near 0 and near a right angle, where a cosine or a sine alone sees nothing."""
    Q = some_basis(0, rank=D)
    angles = torch.tensor([1e-12, 1e-5, 0.3, torch.pi / 2 - 1e-10])
    A = Q[:, :4]
    B = A * angles.cos() + Q[:, 4:8] * angles.sin()
    mixed = B @ random_basis(4, 4, torch.Generator().manual_seed(3))
    assert_close(principal_angles(A, mixed), angles, rtol=0, atol=1e-14)
    assert_close(principal_angles(mixed, A), angles, rtol=0, atol=1e-14)


def test_a_subspace_inside_another_is_at_angle_zero():
    A = some_basis(0)
    for pair in ((A, A[:, :2]), (A[:, :2], A)):
        assert_close(principal_angles(*pair), torch.zeros(2), rtol=0, atol=1e-14)


@pytest.mark.parametrize("rank", [0, 1, RANK, D])
def test_a_random_basis_is_orthonormal_and_repeats_with_its_generator(rank):
    A = some_basis(5, rank)
    assert A.shape == (D, rank)
    assert_orthonormal(A)
    assert torch.equal(A, some_basis(5, rank))


def test_the_energies_of_the_columns_add_up_to_what_is_captured():
    draw = torch.Generator().manual_seed(0)
    x = torch.randn(500, 48, generator=draw) * torch.linspace(1, 2, 48)
    moments = Moments.zero(48, 8).add(x, x[:, :8], 1)
    A = random_basis(48, 8, draw)
    shares = column_energy(A, moments)
    x = x.double()

    assert_close(shares.sum().item(), alignment(A, 1.0, moments).captured)
    assert_close(shares[3], (x @ A[:, 3]).square().sum() / x.square().sum())
