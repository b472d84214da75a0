"""The mathematics of combining low-rank updates of one weight, as pure functions.

An update is a pair of factors ``(A, B)`` of shapes ``(R, I)`` and ``(O, R)`` and stands for the matrix ``B A``. What
prunes single elements (TIES, DARE) needs that matrix; the other functions never form it.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

Factors = tuple[Tensor, Tensor]


def stack(updates: Sequence[Factors], weights: Sequence[float]) -> Factors:
    """Return factors of ``sum_i w_i B_i A_i``, exactly: ``[B_1 ... B_n]`` times ``[w_1 A_1; ...; w_n A_n]``.

    Args:
        updates: Factors of any ranks, over one weight.
        weights: One for each of them, negative ones too.

    Returns:
        Factors whose rank is the sum of the ranks.
    """
    downs = [weight * lora_A for weight, (lora_A, _) in zip(weights, updates, strict=True)]
    return torch.cat(downs), torch.cat([lora_B for _, lora_B in updates], dim=1)


def nearest(factors: Factors, r: int) -> Factors:
    """Return the factors of rank at most ``r`` whose product is nearest to ``B A`` (Eckart and Young, 1936).

    With ``B = Q_B R_B`` and ``A^T = Q_A R_A`` the singular values of ``B A`` are those of the small ``R_B R_A^T``, so
    the ``(O, I)`` product is not formed.

    Args:
        factors: ``A`` of shape ``(R, I)``, ``B`` of shape ``(O, R)``.
        r: The most the rank may be.
    """
    lora_A, lora_B = factors
    left, up = torch.linalg.qr(lora_B)
    right, down = torch.linalg.qr(lora_A.T)
    small_A, small_B = factorize(up @ down.T, r)
    return small_A @ right.T, left @ small_B


def factorize(update: Tensor, r: int) -> Factors:
    """Return the factors of rank at most ``r`` nearest to a matrix ``(O, I)``, equal in size.

    ``U S V^T`` is split as ``(U sqrt(S)) (sqrt(S) V^T)``: neither factor overflows or vanishes alone in few bits.
    """
    left, values, right = torch.linalg.svd(update, full_matrices=False)
    roots = values[:r].sqrt()
    return roots[:, None] * right[:r], left[:, :r] * roots


def weighted_sum(updates: Sequence[Tensor], weights: Sequence[float]) -> Tensor:
    """Return ``sum_i w_i D_i``."""
    total = torch.zeros_like(updates[0])
    for update, weight in zip(updates, weights, strict=True):
        total.add_(update, alpha=weight)
    return total


def elect(updates: Sequence[Tensor], weights: Sequence[float]) -> Tensor:
    """Elect a sign for each element, and average the updates that have it (TIES, arXiv 2306.01708, section 3).

    The sign is that of the sum of the updates, as in the paper, before any weight; a sum of zero counts as positive.
    Each update that agrees is multiplied by its weight and the sum divided by their number, so weights of 1 give the
    paper's disjoint mean.
    """
    positive = sum(updates[1:], updates[0]) >= 0
    total, count = torch.zeros_like(updates[0]), torch.zeros_like(updates[0])
    for update, weight in zip(updates, weights, strict=True):
        agrees = (update != 0) & ((update > 0) == positive)
        total.add_(update * agrees, alpha=weight)
        count += agrees
    return total / count.clamp(min=1)


def trim(update: Tensor, density: float) -> Tensor:
    """Keep the share ``density`` of the elements that is largest in magnitude (TIES, section 3, step 1)."""
    keep = max(1, round(density * update.numel()))
    largest = update.abs().flatten().topk(keep, sorted=False).indices
    return torch.zeros_like(update).flatten().scatter(0, largest, update.flatten()[largest]).view_as(update)


def drop(update: Tensor, density: float, generator: torch.Generator | None = None) -> Tensor:
    """Keep each element with probability ``density``, divided by it (DARE, arXiv 2311.03099, section 3.2).

    Args:
        update: A matrix.
        density: What the paper calls ``1 - p``.
        generator: Where chance comes from; None is torch's global state. The draw is made where the generator is, so
            that one seed gives one result on every device.
    """
    device = torch.device("cpu") if generator is None else generator.device
    keep = torch.bernoulli(torch.full(update.shape, density, device=device), generator=generator)
    return update * keep.to(update) / density
