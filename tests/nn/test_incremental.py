"""Incremental decomposition against the decomposition of all rows at once."""

import pytest
import torch

from lightning_lora.nn.incremental import IncrementalSVD

F64 = torch.float64


def rows(count: int, rank: int, width: int = 40, noise: float = 0.0, dtype=F64) -> torch.Tensor:
    """Rows around a mean, in a space of ``rank`` directions of falling variance."""
    directions = torch.linalg.qr(torch.randn(width, rank, dtype=dtype)).Q.T
    sizes = 2.0 ** -torch.arange(rank, dtype=dtype)
    found = (torch.randn(count, rank, dtype=dtype) * sizes) @ directions + torch.randn(width, dtype=dtype)
    return found + noise * torch.randn(count, width, dtype=dtype)


@pytest.mark.parametrize("sizes", [[300], [100, 100, 100], [7, 200, 1, 92]])
def test_batches_of_any_size_give_the_decomposition_of_all_rows(sizes):
    data = rows(300, 6)
    svd = IncrementalSVD(8)
    for batch in data.split(sizes):
        svd.update(batch)
    centered = data - data.mean(0)
    _, S, Vh = torch.linalg.svd(centered, full_matrices=False)
    assert torch.allclose(svd.singular_values[:6], S[:6], rtol=1e-10)  # no more than 8 directions: nothing is cut off
    assert torch.allclose((svd.components[:6] * Vh[:6]).sum(1).abs(), torch.ones(6, dtype=F64), atol=1e-10)
    assert torch.allclose(svd.explained[:6], (S.square() / centered.square().sum())[:6], rtol=1e-10)
    assert svd.count == 300


def test_components_are_orthonormal_with_fixed_signs():
    svd = IncrementalSVD(5)
    for _ in range(3):
        svd.update(rows(50, 10, noise=0.1, dtype=torch.float32))
    assert torch.allclose(svd.components @ svd.components.T, torch.eye(5), atol=1e-5)
    largest = svd.components.gather(1, svd.components.abs().argmax(1, keepdim=True))
    assert (largest > 0).all()


def test_a_large_batch_is_decomposed_approximately():
    data = rows(2000, 12, width=600, noise=1e-3, dtype=torch.float32)
    svd = IncrementalSVD(8)
    svd.update(data)
    _, S, Vh = torch.linalg.svd(data - data.mean(0), full_matrices=False)
    assert torch.allclose(svd.singular_values, S[:8], rtol=1e-4)
    assert ((svd.components * Vh[:8]).sum(1).abs() > 0.999).all()


def test_directions_settle_once_more_of_the_same_comes():
    data = rows(400, 4)
    svd = IncrementalSVD(4)
    svd.update(data[:20])
    assert not svd.is_settled(4, 0.99)
    svd.update(rows(40, 4))  # other directions
    assert not svd.is_settled(4, 0.99)
    for _ in range(6):
        svd.update(data)
    assert svd.is_settled(4, 0.99)
