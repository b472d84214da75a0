"""The singular values of a weight update, from its factors: the ``(O, I)`` product is never formed.

Norm, effective rank and stable rank are functions of these values, so this is all that has to be computed of an update.
There are two ways: :func:`singular_values` is accurate to rounding and for one layer; :func:`spectra` is for the many
layers of a model in a run, where what counts is to launch little work and to wait for the device once.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence

import torch
from torch import Tensor
from torchmetrics import Metric

Factors = tuple[Tensor, Tensor]
"""``A`` of shape ``(R, I)`` and ``B`` of shape ``(O, R)``, which stand for the update ``B A``."""


@torch.no_grad()
def singular_values(lora_A: Tensor, lora_B: Tensor) -> Tensor:
    """Return the singular values of ``B A``, the largest first.

    With ``B = Q_B R_B`` and ``A^T = Q_A R_A`` they are those of the small ``R_B R_A^T``.

    Args:
        lora_A: Of shape ``(R, I)``.
        lora_B: Of shape ``(O, R)``.

    Returns:
        ``float64`` of shape ``(min(R, I, O),)``.

    Example:
        >>> singular_values(torch.tensor([[3.0, 4.0]]), torch.tensor([[2.0], [0.0]])).tolist()
        [10.0]
    """
    up = torch.linalg.qr(in_float64(lora_B), mode="r").R
    down = torch.linalg.qr(in_float64(lora_A).T, mode="r").R
    values: Tensor = torch.linalg.svdvals(up @ down.T)
    return values


@torch.no_grad()
def spectra(updates: Sequence[Factors]) -> list[Tensor]:
    """Return the singular values of each update, the largest first, from the Gram matrices of its factors.

    With ``A A^T = L L^T`` the squares are the eigenvalues of ``L^T (B^T B) L``; ``L`` is Cholesky's, or, where rows of
    ``A`` depend on each other, made of eigenvectors, which take twenty times as long. The rows of ``A`` are scaled to
    unit length first and the columns of ``B`` by the inverse, which leaves ``B A`` as it is. Squaring costs half of the
    16 digits: values below about ``1e-8`` of the norm of these columns are rounding, as in ``float32`` factors.

    Args:
        updates: Factors of any shapes, on any devices.

    Returns:
        For each update ``float64`` of shape ``(min(R, I, O),)`` on the CPU, NaN where a factor holds NaN or infinity. A
        device is waited for once per rank.
    """
    grams: dict[tuple[int, torch.device], list[tuple[int, Tensor]]] = defaultdict(list)
    for index, (lora_A, lora_B) in enumerate(updates):
        A, B = in_float64(lora_A), in_float64(lora_B)
        grams[A.shape[0], A.device].append((index, torch.stack([A @ A.T, B.T @ B])))
    found: dict[int, Tensor] = {}
    for group in grams.values():
        values = _from_grams(torch.stack([gram for _, gram in group]).cpu())
        found |= {index: row for (index, _), row in zip(group, values, strict=True)}
    return [found[i][: min(A.shape[1], B.shape[0])] for i, (A, B) in enumerate(updates)]


class SingularSpectrum(Metric):
    """The mean spectrum of the updates it has seen, of layers or of steps, each cut or filled with zeros to ``k``.

    Every process of a run holds the same update, and the mean is the same over one of them or over all.

    Args:
        k: Singular values kept.
        **settings: As for ``torchmetrics.Metric``.
    """

    full_state_update = False
    total: Tensor
    count: Tensor

    def __init__(self, k: int, **settings: object) -> None:
        super().__init__(**settings)
        self.k = k
        self.add_state("total", torch.zeros(k, dtype=torch.float64), dist_reduce_fx="sum")
        self.add_state("count", torch.tensor(0), dist_reduce_fx="sum")

    def update(self, values: Tensor) -> None:
        """Take in the singular values of one update, of shape ``(K,)``."""
        kept = values[: self.k].to(self.total)
        self.total[: len(kept)] += kept
        self.count += 1

    def compute(self) -> Tensor:
        """Return the mean, of shape ``(k,)``."""
        return self.total / self.count


def in_float64(tensor: Tensor) -> Tensor:
    """Return a detached tensor in ``float64``, on the CPU where its device does not compute in that."""
    tensor = tensor.detach()
    return tensor.cpu().double() if tensor.device.type == "mps" else tensor.double()


def _from_grams(grams: Tensor) -> Tensor:
    """Singular values of shape ``(N, R)`` from pairs ``A A^T``, ``B^T B`` of shape ``(N, 2, R, R)``; NaN from NaN."""
    finite = grams.isfinite().flatten(1).all(1)
    down, up = torch.where(finite[:, None, None, None], grams, 0).unbind(1)
    lengths = down.diagonal(dim1=-2, dim2=-1).sqrt()
    outer = lengths[:, :, None] * lengths[:, None, :]
    root = _roots(torch.where(outer > 0, down / torch.where(outer > 0, outer, 1), 0))
    squares: Tensor = torch.linalg.eigvalsh(root.mT @ (up * outer) @ root)
    return torch.where(finite[:, None], squares.clamp(min=0).sqrt().flip(-1), torch.nan)


def _roots(grams: Tensor) -> Tensor:
    """``L`` with ``L L^T`` the given matrices, of shape ``(N, R, R)``."""
    roots: Tensor
    roots, failed = torch.linalg.cholesky_ex(grams)
    dependent = failed.nonzero().flatten()
    values, vectors = torch.linalg.eigh(grams[dependent])
    roots[dependent] = vectors * values.clamp(min=0).sqrt()[:, None, :]
    return roots
