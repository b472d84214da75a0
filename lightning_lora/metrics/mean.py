"""What metrics of one number per update share: the mean over the updates they have seen, of all processes."""

from __future__ import annotations

from abc import abstractmethod

import torch
from torch import Tensor
from torchmetrics import Metric


class MeanOfUpdates(Metric):
    """The mean of :meth:`measured` over the updates it has seen, of layers or of steps."""

    full_state_update = False
    total: Tensor
    count: Tensor

    def __init__(self, **settings: object) -> None:
        super().__init__(**settings)
        self.add_state("total", torch.tensor(0.0, dtype=torch.float64), dist_reduce_fx="sum")
        self.add_state("count", torch.tensor(0), dist_reduce_fx="sum")

    @abstractmethod
    def measured(self, values: Tensor) -> Tensor:
        """Return the number of one update, from its singular values of shape ``(K,)``."""

    def update(self, values: Tensor) -> None:
        """Take in the singular values of one update, of shape ``(K,)``."""
        self.total += self.measured(values.to(self.total))
        self.count += 1

    def compute(self) -> Tensor:
        """Return the mean."""
        return self.total / self.count
