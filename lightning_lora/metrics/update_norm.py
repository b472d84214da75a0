"""How far an update has moved a weight: ``||ΔW||_F / ||W||_F``."""

from __future__ import annotations

import torch
from torch import Tensor
from torchmetrics import Metric


def update_norm(values: Tensor) -> Tensor:
    """Return ``||ΔW||_F``, the root of the sum of squares of the singular values.

    Args:
        values: Singular values of shape ``(K,)``.

    Example:
        >>> update_norm(torch.tensor([4.0, 3.0])).item()
        5.0
    """
    norm: Tensor = torch.linalg.vector_norm(values)
    return norm


def relative_update_norm(update: Tensor, base: Tensor) -> Tensor:
    """Return ``||ΔW||_F / ||W||_F`` of all layers together, each a block of one large matrix.

    Args:
        update: ``||ΔW||_F`` of each layer, of shape ``(N,)``.
        base: ``||W||_F`` of each layer.
    """
    ratio: Tensor = torch.linalg.vector_norm(update) / torch.linalg.vector_norm(base)
    return ratio


class RelativeUpdateNorm(Metric):
    """``||ΔW||_F / ||W||_F`` of all layers it has seen together: ``sqrt(sum ||ΔW||^2 / sum ||W||^2)``.

    Every process of a run holds the same layers, so summing over processes changes nothing; where each has layers of
    its own, the result is that of all of them.
    """

    full_state_update = False
    update_squares: Tensor
    base_squares: Tensor

    def __init__(self, **settings: object) -> None:
        super().__init__(**settings)
        self.add_state("update_squares", torch.tensor(0.0, dtype=torch.float64), dist_reduce_fx="sum")
        self.add_state("base_squares", torch.tensor(0.0, dtype=torch.float64), dist_reduce_fx="sum")

    def update(self, update: Tensor, base: Tensor) -> None:
        """Take in ``||ΔW||_F`` and ``||W||_F`` of one layer or of several."""
        self.update_squares += update.to(self.update_squares).square().sum()
        self.base_squares += base.to(self.base_squares).square().sum()

    def compute(self) -> Tensor:
        """Return the ratio."""
        return (self.update_squares / self.base_squares).sqrt()
