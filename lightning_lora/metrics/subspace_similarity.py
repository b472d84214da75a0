"""How much of the directions of one adapter another has found too: φ of the LoRA paper, section 7.2."""

from __future__ import annotations

import torch
from torch import Tensor
from torchmetrics import Metric

from lightning_lora.metrics.spectrum import in_float64


@torch.no_grad()
def subspace_similarity(first: Tensor, second: Tensor) -> Tensor:
    """Return ``φ(i, j) = ||U_i^T V_j||_F^2 / min(i, j)`` for all ``i`` and ``j`` (arXiv 2106.09685, equation 4).

    ``U_i`` holds the ``i`` first right singular vectors of ``first``, ``V_j`` the ``j`` first of ``second``. It is 1
    where the smaller subspace lies in the larger one, 0 where they are orthogonal, and between random subspaces of
    ``R^I`` on average ``max(i, j) / I``. A singular value of zero has no direction: it counts as orthogonal to all.

    Args:
        first: ``A`` of one adapter, of shape ``(R, I)``. For output directions pass ``B^T``.
        second: ``A`` of the other, of shape ``(R', I)``.

    Returns:
        ``float64`` of shape ``(R, R')``; at ``[i - 1, j - 1]`` stands ``φ(i, j)``.

    Raises:
        ValueError: If the two are of layers of different width.

    Example:
        >>> subspace_similarity(torch.eye(2, 4), 3 * torch.eye(2, 4)).diagonal().tolist()
        [1.0, 1.0]
    """
    if first.shape[1] != second.shape[1]:
        raise ValueError(
            f"the directions have {first.shape[1]} and {second.shape[1]} features; compare factors on one layer"
        )
    cosines = _directions(first) @ _directions(second).T
    overlap = cosines.square().cumsum(0).cumsum(1)
    i, j = (torch.arange(1, size + 1, device=overlap.device) for size in overlap.shape)
    return overlap / torch.minimum(i[:, None], j)


class SubspaceSimilarity(Metric):
    """The mean φ over the layers it has seen, as a grid.

    Args:
        first: Rank of the first adapter, the same on all layers.
        second: Rank of the second.
        **settings: As for ``torchmetrics.Metric``.
    """

    full_state_update = False
    total: Tensor
    count: Tensor

    def __init__(self, first: int, second: int, **settings: object) -> None:
        super().__init__(**settings)
        self.add_state("total", torch.zeros(first, second, dtype=torch.float64), dist_reduce_fx="sum")
        self.add_state("count", torch.tensor(0), dist_reduce_fx="sum")

    def update(self, first: Tensor, second: Tensor) -> None:
        """Take in ``A`` of either adapter on one layer, of shapes ``(R, I)`` and ``(R', I)``."""
        found = subspace_similarity(first, second)
        self.total += found.to(self.total)
        self.count += 1

    def compute(self) -> Tensor:
        """Return the mean of shape ``(first, second)``."""
        return self.total / self.count


def _directions(factor: Tensor) -> Tensor:
    """Right singular vectors as rows, the first first; zero where the singular value is."""
    matrix = in_float64(factor)
    _, S, Vh = torch.linalg.svd(matrix, full_matrices=False)
    rounding = max(matrix.shape) * torch.finfo(torch.float64).eps * S[:1]
    directions = torch.where((rounding < S)[:, None], Vh, 0)
    missing = matrix.shape[0] - directions.shape[0]  # more rows than features
    return torch.nn.functional.pad(directions, (0, 0, 0, missing))
