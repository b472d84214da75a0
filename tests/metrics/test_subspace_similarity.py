"""φ of the LoRA paper: 1 for equal subspaces, 0 for orthogonal ones, and its formula in between."""

import pytest
import torch
from torch import Tensor

from lightning_lora.metrics.subspace_similarity import SubspaceSimilarity, subspace_similarity

EXACT = {"rtol": 0, "atol": 1e-12}  # float64


def basis(rows: int, columns: int) -> Tensor:
    return torch.linalg.qr(torch.randn(columns, rows, dtype=torch.float64)).Q.T


def scaled(directions: Tensor) -> Tensor:
    """A matrix whose right singular vectors are these, in this order."""
    values = torch.arange(len(directions), 0, -1, dtype=torch.float64)
    return basis(len(directions), len(directions)) @ (values[:, None] * directions)


def test_an_adapter_shares_all_directions_with_itself():
    A = scaled(basis(6, 20))
    phi = subspace_similarity(A, A)
    assert torch.allclose(phi, torch.ones(6, 6, dtype=torch.float64), **EXACT)


def test_orthogonal_subspaces_share_none():
    directions = basis(8, 20)
    assert torch.allclose(
        subspace_similarity(scaled(directions[:3]), scaled(directions[3:])),
        torch.zeros(3, 5, dtype=torch.float64),
        **EXACT,
    )


def test_the_first_direction_alone_is_shared_as_in_the_papers_figure():
    """``φ(i, j) = 1 / min(i, j)`` where just the top direction is common: figure 3 in its plainest form."""
    directions = basis(9, 20)
    first, second = directions[:4], torch.cat([directions[:1], directions[4:9]])
    phi = subspace_similarity(scaled(first), scaled(second))
    expected = [[1 / min(i, j) for j in range(1, 7)] for i in range(1, 5)]
    assert torch.allclose(phi, torch.tensor(expected, dtype=torch.float64), **EXACT)


def test_it_is_the_formula_of_the_paper():
    """Equation 4 with torch's own decomposition, one (i, j) at a time."""
    A, B = torch.randn(5, 12, dtype=torch.float64), torch.randn(3, 12, dtype=torch.float64)
    U, V = (torch.linalg.svd(matrix).Vh.T for matrix in (A, B))
    phi = subspace_similarity(A, B)
    for i in range(1, 6):
        for j in range(1, 4):
            expected = torch.linalg.matrix_norm(U[:, :i].T @ V[:, :j]) ** 2 / min(i, j)
            assert torch.allclose(phi[i - 1, j - 1], expected, **EXACT)


def test_it_follows_from_the_distance_of_the_projections():
    """Appendix G: ``φ = 1 - d^2 / p`` with the projection metric ``d^2 = p - ||U^T V||^2``."""
    A, B = scaled(basis(4, 10)), scaled(basis(4, 10))
    projections = [torch.linalg.pinv(matrix) @ matrix for matrix in (A, B)]
    squared = torch.linalg.matrix_norm(projections[0] - projections[1]) ** 2 / 2  # of two projections of rank 4
    assert torch.allclose(subspace_similarity(A, B)[-1, -1], 1 - squared / 4, **EXACT)


def test_neither_scale_nor_sign_nor_mixing_of_rows_matters():
    A, B = scaled(basis(4, 10)), scaled(basis(4, 10))
    turned = basis(4, 4) @ A
    assert torch.allclose(subspace_similarity(-7 * turned, B), subspace_similarity(A, B), **EXACT)


def test_random_subspaces_share_what_chance_gives():
    """``E φ(i, j) = max(i, j) / I``; over 200 draws of 4 and 8 in 64 the mean is within 10%, ten standard errors."""
    draws = [subspace_similarity(torch.randn(4, 64), torch.randn(8, 64))[-1, -1] for _ in range(200)]
    assert torch.stack(draws).mean().item() == pytest.approx(8 / 64, rel=0.1)


def test_a_direction_that_is_not_there_is_shared_with_nothing():
    directions = basis(2, 10)
    lacking = torch.cat([directions, torch.zeros(1, 10, dtype=torch.float64)])
    phi = subspace_similarity(lacking, torch.eye(10, dtype=torch.float64))
    assert torch.allclose(phi[-1, -1], torch.tensor(2 / 3, dtype=torch.float64), **EXACT)
    assert (subspace_similarity(torch.zeros(2, 10), directions) == 0).all()


def test_more_rows_than_features_have_no_further_directions():
    phi = subspace_similarity(torch.randn(5, 3), torch.eye(3))
    assert torch.allclose(phi[:, -1], torch.tensor([1, 1, 1, 1, 1], dtype=torch.float64), **EXACT)


def test_layers_of_different_width_are_refused():
    with pytest.raises(ValueError, match="10 and 12 features; compare factors on one layer"):
        subspace_similarity(torch.randn(2, 10), torch.randn(2, 12))


def test_the_metric_is_the_mean_over_layers():
    pairs = [(torch.randn(2, 8), torch.randn(3, 8)), (torch.randn(2, 5), torch.randn(3, 5))]
    metric = SubspaceSimilarity(2, 3)
    for pair in pairs:
        metric.update(*pair)
    expected = sum(subspace_similarity(*pair) for pair in pairs) / 2
    assert torch.allclose(metric.compute(), expected, **EXACT)
