"""Over how many directions an update is spread: the exponential of the entropy of its spectrum."""

from __future__ import annotations

import torch
from torch import Tensor
from torchmetrics import Metric


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


class EffectiveRank(Metric):
    """The mean :func:`effective_rank` of the updates it has seen, of layers or of steps."""

    full_state_update = False
    total: Tensor
    count: Tensor

    def __init__(self, **settings: object) -> None:
        super().__init__(**settings)
        self.add_state("total", torch.tensor(0.0, dtype=torch.float64), dist_reduce_fx="sum")
        self.add_state("count", torch.tensor(0), dist_reduce_fx="sum")

    def update(self, values: Tensor) -> None:
        """Take in the singular values of one update, of shape ``(K,)``."""
        self.total += effective_rank(values.to(self.total))
        self.count += 1

    def compute(self) -> Tensor:
        """Return the mean."""
        return self.total / self.count
