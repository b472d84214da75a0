"""LoftQ: a quantized base and a low-rank start that are fitted to each other."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from lightning_lora.nn.decompose import Pair, pissa, without

STEPS = 5
"""How often base and start are fitted in turn; what the paper uses."""

Rounded = Callable[[Tensor], Tensor]
"""What a weight ``(O, I)`` is once it has been stored in few bits and read back."""


@dataclass(frozen=True)
class LoftQ:
    """A fit ``W = deq(Q) + s B A`` of quantized base and start.

    Attributes:
        start: ``A`` and ``B``.
        taken: The pair before them, which is taken off the weight that is quantized: ``Q = quantized(W - s B' A')``.
        error: ``||W - deq(Q) - s B A||``, the Frobenius norm.
    """

    start: Pair
    taken: Pair
    error: float


def fit(weight: Tensor, rounded: Rounded, r: int, scaling: float, steps: int = STEPS) -> LoftQ:
    """Alternate ``Q = quantized(W - s B A)`` and ``s B A = svd_r(W - deq(Q))`` (LoftQ, arXiv 2310.08659, algorithm 1).

    The first step starts from ``B A = 0``, so ``Q`` is the plain quantized weight and the best low-rank correction of
    its error (Eckart and Young) never makes it worse. Later steps nearly always help, but not by necessity: the best of
    all is returned.

    Args:
        weight: ``W`` of shape ``(O, I)``, in ``float32`` or ``float64``.
        rounded: The quantizer.
        r: ``R``.
        scaling: ``s``. The paper has none; with it the factors are divided by its root, so that any ``alpha`` will do.
        steps: How often to alternate.
    """
    taken = weight.new_zeros(r, weight.shape[1]), weight.new_zeros(weight.shape[0], r)
    best: LoftQ | None = None
    for _ in range(steps):
        rest = weight - rounded(without(weight, taken, scaling))
        start = pissa(rest, r, scaling)
        error = norm(without(rest, start, scaling))
        if best is None or error < best.error:
            best = LoftQ(start, taken, error)
        taken = start
    assert best is not None
    return best


def norm(matrix: Tensor) -> float:
    """The Frobenius norm, summed in ``float64``."""
    return float(torch.linalg.vector_norm(matrix, dtype=torch.float64))
