"""The principal directions of rows that come in batches, with memory for the directions and one batch."""

from __future__ import annotations

import torch
from torch import Tensor

from lightning_lora.nn.decompose import fixed_signs, top_svd

_EXACT = 256  # up to here a whole decomposition is as fast as a randomized one
_ITERATIONS = 4
_SPARE = 10  # components kept beyond those asked for, so that cutting off does not turn the last of them


class IncrementalSVD:
    """The first ``k`` right singular vectors of all rows seen so far, less their mean (Ross et al., 2008, algorithm 1).

    What is kept of earlier rows, ``diag(S) V^T``, is decomposed together with each new batch and a row for the shift of
    the mean. Some more than ``k`` components are kept.

    Attributes:
        count: Rows seen.
    """

    def __init__(self, k: int) -> None:
        self.k = k
        self.count = 0
        self._components = torch.empty(0, 0)
        self._singular_values = torch.empty(0)
        self._mean = torch.empty(0)
        self._cosines = torch.empty(0)
        self._scatter = 0.0

    @property
    def components(self) -> Tensor:
        """``V^T`` of shape ``(k, I)``: orthonormal rows, the largest first, with fixed signs."""
        return self._components[: self.k]

    @property
    def singular_values(self) -> Tensor:
        """``S`` of shape ``(k,)``."""
        return self._singular_values[: self.k]

    @property
    def explained(self) -> Tensor:
        """The share of the variance in each component's direction, of shape ``(k,)``."""
        return self.singular_values.square() / max(self._scatter, torch.finfo(torch.float64).tiny)

    def update(self, rows: Tensor) -> None:
        """Take in rows of shape ``(N, I)``."""
        rows = rows.to(torch.promote_types(rows.dtype, torch.float32))
        mean, known = rows.mean(0), self._components
        centered = rows - mean
        total = self.count + len(rows)
        self._scatter += float(torch.linalg.vector_norm(centered, dtype=torch.float64)) ** 2
        if self.count:
            shift = (self.count * len(rows) / total) ** 0.5 * (self._mean - mean)
            self._scatter += float(torch.linalg.vector_norm(shift, dtype=torch.float64)) ** 2
            centered = torch.cat([self._singular_values[:, None] * known, centered, shift[None]])
            mean = self._mean + (mean - self._mean) * (len(rows) / total)
        self.count, self._mean = total, mean
        self._decompose(centered)
        same = known.shape == self._components.shape
        self._cosines = (known * self._components).sum(1).abs() if same else torch.zeros(self.k)

    def is_settled(self, first: int, tau: float) -> bool:
        """Whether the last rows have turned none of the ``first`` components further than to a cosine of ``tau``."""
        return len(self._cosines) >= first and bool((self._cosines[:first] >= tau).all())

    def _decompose(self, matrix: Tensor) -> None:
        kept = self.k + _SPARE
        if min(matrix.shape) <= max(_EXACT, 2 * kept):
            _, S, Vh = torch.linalg.svd(matrix, full_matrices=False)
        else:
            _, S, Vh = top_svd(matrix, kept, _ITERATIONS)
        S, Vh = S[:kept], Vh[:kept]
        self._singular_values, self._components = S, Vh * fixed_signs(Vh)[:, None]
