"""Products with few tokens, where dequantizing the whole weight costs more than the product itself.

With one token the weight is read once and used once. Dequantizing first moves 4.5 bytes for each of its elements
(half a byte of code read, two written, two read again), bitsandbytes' ``gemm_4bit`` half a byte. It also computes with
the weight in another rounding, so that what is multiplied is no longer bit for bit what merging would add to.

On an H200 prototypes took, for 4096 x 4096 and 11008 x 4096: one token 40 and 66 us dequantized, 23 and 26 us by
``gemm_4bit``; sixteen tokens 38 and 75 against 58 and 69. No version of this package has been measured, so no device is
listed and every product is dequantized. ``tests/benchmarks/nf4_kernels.py --device cuda`` prints what decides.
"""

from __future__ import annotations

import torch
from torch import Tensor

from lightning_lora import dependencies
from lightning_lora.kernels.maxima import nested_map
from lightning_lora.kernels.packed import Packed

MOST_TOKENS: dict[tuple[int, int], int] = {}
"""Tokens up to which ``gemm_4bit`` computes, by compute capability of the GPU; 0 where none is listed."""


def are_few(x: Tensor) -> bool:
    """Whether ``x`` of shape ``(..., I)`` goes through :func:`gemm_4bit`: never where gradients are recorded."""
    if not MOST_TOKENS or x.device.type != "cuda" or torch.is_grad_enabled():
        return False
    return 0 < x.numel() // x.shape[-1] <= MOST_TOKENS.get(torch.cuda.get_device_capability(x.device), 0)


def gemm_4bit(x: Tensor, packed: Packed, shape: tuple[int, int], bias: Tensor | None, codebook: str) -> Tensor:
    """Return ``x W^T + b`` from the codes themselves.

    Args:
        x: Of shape ``(..., I)``.
        packed: The weight.
        shape: ``(O, I)``.
        bias: Of shape ``(O,)`` in ``x``'s dtype, or None.
        codebook: bitsandbytes' word for it: ``nf4`` or ``fp4``.
    """
    dependencies.bitsandbytes(codebook.upper())
    floats = packed.as_floats()
    maxima = (floats.nested_absmax, floats.absmax, nested_map(x.device), floats.offset)
    absmax, *nested = maxima if packed.nested else (floats.absmax, None, None, None)
    operator = torch.ops.bitsandbytes.gemm_4bit.default
    y: Tensor = operator(x, packed.codes, shape, absmax, packed.block_size, codebook, bias, *nested)
    return y
