"""Dequantizing NF4 and FP4 with bitsandbytes' operators: the reference, on CPU, and where no Triton kernel can run.

They are called directly. ``functional.dequantize_4bit`` and the ``QuantState`` it wants take some 200 us of Python for
each call, several times what the kernel takes for a 512 x 512 weight.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from lightning_lora import dependencies
from lightning_lora.kernels.maxima import block_maxima
from lightning_lora.kernels.packed import Packed


def dequantize(packed: Packed, shape: Sequence[int], dtype: torch.dtype, codebook: str) -> Tensor:
    """Return the weight; constants are ``float32``, and ``codebook`` is bitsandbytes' word: ``nf4`` or ``fp4``."""
    dependencies.bitsandbytes(codebook.upper())
    count = math.prod(shape)
    if count == 0:
        return torch.empty(shape, dtype=dtype, device=packed.codes.device)
    maxima = block_maxima(packed)
    operator = torch.ops.bitsandbytes.dequantize_4bit.default
    if shape[-1] % 2 == 0:
        return _tensor(operator(packed.codes, maxima, packed.block_size, codebook, shape, dtype))
    # On the CPU its rows have to be whole bytes: one row of all of them, the spare half-byte cut off.
    row = operator(packed.codes, maxima, packed.block_size, codebook, [1, 2 * packed.codes.numel()], dtype)
    return _tensor(row.view(-1)[:count].view(*shape).clone())


def _tensor(found: Tensor) -> Tensor:
    return found
