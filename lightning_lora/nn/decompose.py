"""Starts that are computed from the base weight: a pair ``A0: (R, I)``, ``B0: (O, R)`` whose product is a part of it.

Everything here is deterministic: the same weight on the same kind of device gives the same bits. Signs, which a
decomposition leaves open, are fixed, and the sketch of the randomized one is drawn on the CPU from a seed of its own.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

Pair = tuple[Tensor, Tensor]
Decomposition = Callable[[Tensor, int, float], Pair]

_OVERSAMPLING = 10  # Halko, Martinsson and Tropp (arXiv 0909.4061, section 4.3): 5 or 10 more vectors than asked for
_PIECE = 2**20  # weights that are in float64 at once


def pissa(weight: Tensor, r: int, scaling: float) -> Pair:
    """The principal part of a weight (PiSSA, arXiv 2404.02948, equations 2 and 3).

    ``W = U S V^T``; ``A0 = sqrt(S_r / s) V_r^T``, ``B0 = U_r sqrt(S_r / s)``: ``s B0 A0`` is the nearest matrix of rank
    ``R``. A component whose singular value is zero is split as ``0`` and ``V``, so that it can still be trained.

    Args:
        weight: Of shape ``(O, I)``, in ``float32`` or ``float64``.
        r: ``R``.
        scaling: ``s``.
    """
    return _balanced(torch.linalg.svd(weight, full_matrices=False), r, scaling)


def pissa_niter(weight: Tensor, r: int, scaling: float, iterations: int) -> Pair:
    """:func:`pissa` by a randomized decomposition with that many subspace iterations: much faster, nearly as good."""
    return _balanced(top_svd(weight, r, iterations), r, scaling)


def olora(weight: Tensor, r: int, scaling: float) -> Pair:
    """The first columns of a QR decomposition (OLoRA, arXiv 2406.01775, algorithm 1).

    ``W = Q R``; ``A0 = R_r``, ``B0 = Q_r``, with a positive diagonal in ``R``. As in the paper and in PEFT the factors
    are not divided by ``s``: what the adapter starts with is ``s Q_r R_r``, and that is what is taken off the weight.
    """
    Q, R = torch.linalg.qr(weight)
    signs = torch.where(R.diagonal() < 0, -1.0, 1.0).to(R.dtype)[:r]
    return signs[:, None] * R[:r], Q[:, :r] * signs


DECOMPOSITIONS: dict[str, Decomposition] = {"pissa": pissa, "olora": olora}


def decomposition(init: str) -> Decomposition | None:
    """The decomposition of that name, ``pissa_niter_4`` and the like included, or None if it is none."""
    numbered = re.fullmatch(r"pissa_niter_(\d{1,3})", init)
    return DECOMPOSITIONS.get(init) if numbered is None else partial(pissa_niter, iterations=int(numbered[1]))


def top_svd(matrix: Tensor, k: int, iterations: int) -> tuple[Tensor, Tensor, Tensor]:
    """Return the ``k`` first (and a few more) singular triplets, approximately (arXiv 0909.4061, algorithm 4.4).

    Args:
        matrix: Of shape ``(M, N)``.
        k: How many are wanted.
        iterations: Subspace iterations; more for a flatter spectrum.

    Returns:
        ``U: (M, K)``, ``S: (K,)``, ``V^T: (K, N)`` with ``k <= K <= k + 10``.
    """
    size = min(k + _OVERSAMPLING, *matrix.shape)
    sketch = torch.randn(matrix.shape[1], size, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    basis = torch.linalg.qr(matrix @ sketch.to(matrix)).Q
    for _ in range(iterations):
        basis = torch.linalg.qr(matrix @ torch.linalg.qr(matrix.T @ basis).Q).Q
    U, S, Vh = torch.linalg.svd(basis.T @ matrix, full_matrices=False)
    return basis @ U, S, Vh


def without(weight: Tensor, pair: Pair, scaling: float) -> Tensor:
    """Return ``W - s B0 A0`` in ``float32`` at least.

    Computed in ``float64`` and rounded once, so that devices agree on what is left and hence on its 4-bit codes.
    """
    lora_A, lora_B = (factor.to(weight.device, torch.float64) for factor in pair)
    rest = torch.empty_like(weight, dtype=torch.promote_types(weight.dtype, torch.float32))
    rows = max(1, _PIECE // weight.shape[1])
    for start in range(0, weight.shape[0], rows):
        piece = slice(start, start + rows)
        rest[piece] = weight[piece].double() - scaling * (lora_B[piece] @ lora_A)
    return rest


def fixed_signs(rows: Tensor) -> Tensor:
    """Return +1 or -1 for each row: what makes its largest element positive."""
    largest = rows.gather(1, rows.abs().argmax(1, keepdim=True))[:, 0]
    return torch.where(largest < 0, -1.0, 1.0).to(rows.dtype)


def _balanced(svd: tuple[Tensor, Tensor, Tensor], r: int, scaling: float) -> Pair:
    """Share the singular values between both factors."""
    U, S, Vh = svd[0][:, :r], svd[1][:r], svd[2][:r]
    U, Vh = U * fixed_signs(Vh), Vh * fixed_signs(Vh)[:, None]
    root = (S / scaling).sqrt()
    rounding = max(U.shape[0], Vh.shape[1]) * torch.finfo(S.dtype).eps * S[:1]
    zero = rounding >= S
    return torch.where(zero, 1.0, root)[:, None] * Vh, U * torch.where(zero, 0.0, root)
