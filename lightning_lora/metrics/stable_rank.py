"""How many directions carry an update's energy: its stable rank."""

from __future__ import annotations

import torch
from torch import Tensor

from lightning_lora.metrics.mean import MeanOfUpdates


def stable_rank(values: Tensor) -> Tensor:
    """Return ``||ΔW||_F^2 / ||ΔW||_2^2 = sum σ_i^2 / σ_1^2`` (Rudelson and Vershynin, J. ACM 54(4), 2007).

    Small singular values count for less than in :func:`~lightning_lora.metrics.effective_rank.effective_rank`. It is 0
    for a zero update.

    Args:
        values: Singular values of shape ``(..., K)``.

    Returns:
        Of shape ``(...)``, between 1 and ``K``.

    Example:
        >>> stable_rank(torch.tensor([2.0, 1.0])).item()
        1.25
    """
    largest = values.amax(-1, keepdim=True)
    relative = values / torch.where(largest > 0, largest, 1)
    return relative.square().sum(-1)


class StableRank(MeanOfUpdates):
    """The mean :func:`stable_rank` of the updates it has seen, of layers or of steps."""

    def measured(self, values: Tensor) -> Tensor:
        """Return the :func:`stable_rank` of one update."""
        return stable_rank(values)
