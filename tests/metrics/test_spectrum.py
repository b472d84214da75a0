"""Spectra, norms and ranks of updates equal their closed forms, and the dense matrix's own."""

import math

import pytest
import torch
from torch import Tensor

from lightning_lora.metrics.effective_rank import EffectiveRank, effective_rank
from lightning_lora.metrics.spectrum import SingularSpectrum, singular_values, spectra
from lightning_lora.metrics.stable_rank import StableRank, stable_rank
from lightning_lora.metrics.update_norm import RelativeUpdateNorm, relative_update_norm, update_norm

KNOWN = [5.0, 2.0, 1.0, 0.25]


def orthonormal(rows: int, columns: int) -> Tensor:
    return torch.linalg.qr(torch.randn(columns, rows, dtype=torch.float64)).Q.T


def with_spectrum(values: list[float], wide: int = 40, tall: int = 24) -> tuple[Tensor, Tensor]:
    """Factors of ``U diag(values) V^T``, mixed by an invertible matrix, so that neither shows the values."""
    r = len(values)
    mix = torch.randn(r, r, dtype=torch.float64) + 3 * torch.eye(r, dtype=torch.float64)
    A = torch.linalg.solve(mix, torch.tensor(values, dtype=torch.float64)[:, None] * orthonormal(r, wide))
    return A, orthonormal(r, tall).T @ mix


def gram_spectrum(lora_A: Tensor, lora_B: Tensor) -> Tensor:
    return spectra([(lora_A, lora_B)])[0]


@pytest.mark.parametrize(
    ("compute", "tolerance"),
    [(singular_values, 1e-13), (gram_spectrum, 1e-6)],  # of the largest: eps times condition; its root
    ids=["qr", "gram"],
)
class TestBothWays:
    def test_a_known_spectrum_is_found(self, compute, tolerance):
        found = compute(*with_spectrum(KNOWN))
        assert torch.allclose(found, torch.tensor(KNOWN, dtype=torch.float64), rtol=0, atol=5 * tolerance)

    @pytest.mark.parametrize("rank", [0, 1, 3])
    def test_a_matrix_of_rank_k_has_k_values(self, compute, tolerance, rank):
        found = compute(*with_spectrum([2.0] * rank + [0.0] * (4 - rank)))
        assert torch.allclose(found[:rank], torch.full((rank,), 2.0, dtype=torch.float64), rtol=tolerance)
        assert (found[rank:] <= 2 * tolerance).all()

    @pytest.mark.parametrize(("r", "wide", "tall"), [(1, 5, 7), (4, 3, 9), (9, 4, 3), (16, 64, 48)])
    def test_they_are_those_of_the_dense_product(self, compute, tolerance, r, wide, tall):
        A, B = torch.randn(r, wide), torch.randn(tall, r)
        dense = torch.linalg.svdvals(B.double() @ A.double())
        found = compute(A, B)
        assert found.shape == (min(r, wide, tall),)
        assert torch.allclose(found, dense[: len(found)], rtol=0, atol=tolerance * dense[0].item())

    def test_a_fresh_adapter_has_an_update_of_zero(self, compute, tolerance):
        found = compute(torch.randn(4, 9), torch.zeros(6, 4))
        assert (found == 0).all()
        assert (effective_rank(found), stable_rank(found), update_norm(found)) == (0, 0, 0)

    def test_a_small_change_beside_large_factors_is_measured(self, compute, tolerance):
        """As of a start in the weight: ``[B, B - B0] [A - A0; A0]``, where differences are a millionth of the rest."""
        A0, B0 = torch.randn(4, 40, dtype=torch.float64), torch.randn(24, 4, dtype=torch.float64)
        a, b = (1e-6 * torch.randn(*t.shape, dtype=torch.float64) for t in (A0, B0))
        dense = torch.linalg.svdvals((B0 + b) @ (A0 + a) - B0 @ A0)[:8]
        found = compute(torch.cat([a, A0]), torch.cat([B0 + b, b], dim=1))
        assert torch.allclose(found, dense, rtol=0, atol=1e-6 * dense[0].item())


def test_updates_of_several_ranks_and_shapes_come_back_in_order():
    pairs = [(torch.randn(r, wide), torch.randn(tall, r)) for r, wide, tall in [(2, 8, 9), (4, 5, 6), (2, 3, 4)]]
    for found, pair in zip(spectra(pairs), pairs, strict=True):
        assert torch.allclose(found, singular_values(*pair), atol=1e-6)
    assert spectra([]) == []


def test_a_layer_whose_directions_depend_on_each_other_is_measured_beside_one_whose_do_not():
    A, B = torch.randn(4, 9), torch.randn(6, 4)
    same = A[[0, 0, 1, 1]]
    for found, rows in zip(spectra([(A, B), (same, B)]), (A, same), strict=True):
        assert torch.allclose(found, singular_values(rows, B), rtol=0, atol=1e-6 * found[0].item())


def test_a_diverged_adapter_is_not_a_number_and_leaves_the_others_alone():
    good, bad = (torch.ones(1, 2), torch.ones(2, 1)), (torch.tensor([[math.nan, 1.0]]), torch.ones(2, 1))
    first, second = spectra([good, bad])
    assert first.item() == pytest.approx(2.0)
    assert second.isnan().all()


@pytest.mark.parametrize("k", [1, 2, 7])
def test_k_equal_directions_have_both_ranks_k(k):
    values = torch.tensor([3.0] * k + [0.0] * 2, dtype=torch.float64)
    assert effective_rank(values).item() == pytest.approx(k, rel=1e-12)
    assert stable_rank(values).item() == k


def test_ranks_of_a_known_spectrum_are_their_formulas():
    values = torch.tensor([3.0, 1.0], dtype=torch.float64)
    entropy = -(0.75 * math.log(0.75) + 0.25 * math.log(0.25))
    assert effective_rank(values).item() == pytest.approx(math.exp(entropy), rel=1e-12)
    assert stable_rank(values).item() == pytest.approx(10 / 9, rel=1e-12)
    assert 1 <= stable_rank(values) <= effective_rank(values) <= 2


def test_the_norm_is_that_of_the_dense_product():
    A, B = torch.randn(4, 9, dtype=torch.float64), torch.randn(6, 4, dtype=torch.float64)
    expected = torch.linalg.matrix_norm(B @ A)
    assert torch.allclose(update_norm(singular_values(A, B)), expected, rtol=1e-12)


def test_the_relative_norm_is_that_of_all_layers_as_one_block_matrix():
    deltas, weights = [torch.randn(3, 4), torch.randn(5, 2)], [torch.randn(3, 4), torch.randn(5, 2)]
    one = torch.block_diag(*deltas).norm() / torch.block_diag(*weights).norm()
    norms = [torch.stack([t.norm() for t in tensors]) for tensors in (deltas, weights)]
    metric = RelativeUpdateNorm()
    for update, base in zip(*norms, strict=True):
        metric.update(update, base)
    assert torch.allclose(relative_update_norm(*norms), one)
    assert metric.compute().item() == pytest.approx(one.item(), rel=1e-6)


@pytest.mark.parametrize(
    ("metric", "function"),
    [(EffectiveRank, effective_rank), (StableRank, stable_rank)],
)
def test_a_rank_metric_is_the_mean_over_what_it_has_seen(metric, function):
    seen = [torch.rand(5, dtype=torch.float64), torch.rand(3, dtype=torch.float64)]
    made = metric()
    for values in seen:
        made.update(values)
    assert made.compute().item() == pytest.approx(sum(function(v).item() for v in seen) / 2, rel=1e-12)
    made.reset()
    made.update(seen[0])
    assert made.compute().item() == pytest.approx(function(seen[0]).item(), rel=1e-12)


def test_the_mean_spectrum_fills_up_and_cuts_off():
    metric = SingularSpectrum(3)
    metric.update(torch.tensor([4.0, 2.0]))
    metric.update(torch.tensor([2.0, 2.0, 2.0, 2.0]))
    assert metric.compute().tolist() == [3.0, 2.0, 1.0]
