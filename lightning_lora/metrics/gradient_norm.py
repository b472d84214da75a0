"""The length of a gradient over many tensors."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor
from torchmetrics import Metric


@torch.no_grad()
def gradient_norm(gradients: Iterable[Tensor]) -> Tensor:
    """Return ``sqrt(sum ||g||^2)``, in ``float32`` at least, without waiting for the device.

    Args:
        gradients: Tensors of any shapes on one device, at least one.
    """
    found = [g.detach().to(torch.promote_types(g.dtype, torch.float32)) for g in gradients]
    return torch.nn.utils.get_total_norm(found)


class GradientNorm(Metric):
    """The root mean square of :func:`gradient_norm` over the steps it has seen.

    Under DistributedDataParallel gradients are reduced before a step, so each process counts the same ones and the mean
    over processes is that of any of them.
    """

    full_state_update = False
    squares: Tensor
    count: Tensor

    def __init__(self, **settings: object) -> None:
        super().__init__(**settings)
        self.add_state("squares", torch.tensor(0.0, dtype=torch.float64), dist_reduce_fx="sum")
        self.add_state("count", torch.tensor(0), dist_reduce_fx="sum")

    def update(self, gradients: Iterable[Tensor]) -> None:
        """Take in the gradients of one step."""
        self.squares += gradient_norm(gradients).to(self.squares).square()
        self.count += 1

    def compute(self) -> Tensor:
        """Return the root of the mean square."""
        return (self.squares / self.count).sqrt()
