"""Over how many directions an update is spread: the exponential of the entropy of its spectrum."""

from __future__ import annotations

import torch
from torch import Tensor

from lightning_lora.metrics.mean import MeanOfUpdates


def effective_rank(values: Tensor) -> Tensor:
    """Return ``exp(-sum p_i ln p_i)`` with ``p_i = σ_i / sum σ`` (Roy and Vetterli, EUSIPCO 2007, definition 1).

    It is ``k`` for ``k`` equal singular values, and 1 where one dominates; 0 for a zero update.

    Args:
        values: Singular values of shape ``(..., K)``.

    Returns:
        Of shape ``(...)``, between 1 and ``K``.

    Example:
        >>> effective_rank(torch.tensor([2.0, 2.0, 0.0])).item()
        2.0
    """
    total = values.sum(-1, keepdim=True)
    shares = values / torch.where(total > 0, total, 1)
    entropy = -torch.xlogy(shares, shares).sum(-1)
    return torch.where(total.squeeze(-1) > 0, entropy.exp(), 0)


class EffectiveRank(MeanOfUpdates):
    """The mean :func:`effective_rank` of the updates it has seen, of layers or of steps."""

    def measured(self, values: Tensor) -> Tensor:
        """Return the :func:`effective_rank` of one update."""
        return effective_rank(values)
