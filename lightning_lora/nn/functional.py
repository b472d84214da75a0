"""The mathematics of low-rank adaptation as pure functions.

Shapes, here and everywhere: ``...`` any leading axes, ``I`` input features, ``O`` output features, ``R`` rank. Weights
stand as in ``nn.Linear``: ``W`` is ``(O, I)``, ``lora_A`` (down) is ``(R, I)``, ``lora_B`` (up) is ``(O, R)``.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F


def add_low_rank(y: Tensor, x: Tensor, lora_A: Tensor, lora_B: Tensor, scaling: float) -> Tensor:
    """Return ``y + s (x A^T) B^T`` without forming the ``(O, I)`` product.

    The factors are cast to ``y``'s dtype, not ``x`` to theirs: with full-precision factors over a half-precision base,
    this keeps every saved activation in half precision. Autograd keeps ``x`` itself and the ``(..., R)`` product,
    nothing else of ``x``'s size.

    Args:
        y: Output so far, of shape ``(..., O)``.
        x: Input of shape ``(..., I)``; cast to ``y``'s dtype.
        lora_A: Down projection of shape ``(R, I)``.
        lora_B: Up projection of shape ``(O, R)``.
        scaling: The factor ``s``.

    Returns:
        Tensor of ``y``'s shape and dtype.
    """
    down = F.linear(x.to(y.dtype), lora_A.to(y.dtype)).reshape(-1, lora_A.shape[0])
    return torch.addmm(y.reshape(-1, y.shape[-1]), down, lora_B.to(y.dtype).t(), alpha=scaling).view(y.shape)


def delta(lora_A: Tensor, lora_B: Tensor, scaling: float, dtype: torch.dtype) -> Tensor:
    """Return the weight update ``s B A`` of shape ``(O, I)``, computed in ``dtype``."""
    return (lora_B.to(dtype) @ lora_A.to(dtype)).mul_(scaling)
