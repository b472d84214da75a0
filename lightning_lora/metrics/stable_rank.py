"""How many directions carry an update's energy: its stable rank."""

from __future__ import annotations

import torch
from torch import Tensor
from torchmetrics import Metric


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


class StableRank(Metric):
    """The mean :func:`stable_rank` of the updates it has seen, of layers or of steps."""

    full_state_update = False
    total: Tensor
    count: Tensor

    def __init__(self, **settings: object) -> None:
        super().__init__(**settings)
        self.add_state("total", torch.tensor(0.0, dtype=torch.float64), dist_reduce_fx="sum")
        self.add_state("count", torch.tensor(0), dist_reduce_fx="sum")

    def update(self, values: Tensor) -> None:
        """Take in the singular values of one update, of shape ``(K,)``."""
        self.total += stable_rank(values.to(self.total))
        self.count += 1

    def compute(self) -> Tensor:
        """Return the mean."""
        return self.total / self.count
