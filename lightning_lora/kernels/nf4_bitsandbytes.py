"""Dequantizing NF4 with bitsandbytes' operators: the reference, the way on a CPU, and where no Triton kernel can run.

They are called directly. ``functional.dequantize_4bit`` and the ``QuantState`` it wants take some 200 us of Python for
each call, several times what the kernel takes for a 512 x 512 weight.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import lru_cache

import torch
from torch import Tensor

from lightning_lora import dependencies
from lightning_lora.kernels.packed import NESTED_BLOCK, Packed


def dequantize(packed: Packed, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
    """Return the weight; constants are ``float32``."""
    dependencies.bitsandbytes("NF4")
    count = math.prod(shape)
    if count == 0:
        return torch.empty(shape, dtype=dtype, device=packed.codes.device)
    maxima = block_maxima(packed)
    operator = torch.ops.bitsandbytes.dequantize_4bit.default
    if shape[-1] % 2 == 0:
        return _tensor(operator(packed.codes, maxima, packed.block_size, "nf4", shape, dtype))
    # On the CPU its rows have to be whole bytes: one row of all of them, the spare half-byte cut off.
    row = operator(packed.codes, maxima, packed.block_size, "nf4", [1, 2 * packed.codes.numel()], dtype)
    return _tensor(row.view(-1)[:count].view(*shape).clone())


def block_maxima(packed: Packed) -> Tensor:
    """Return the maximum of each block in ``float32``, of shape ``(blocks,)``."""
    if not packed.nested:
        return packed.absmax
    operator = torch.ops.bitsandbytes.dequantize_blockwise.default
    levels = nested_map(packed.absmax.device)
    maxima = _tensor(operator(packed.absmax, packed.nested_absmax, levels, NESTED_BLOCK, torch.float32))
    return maxima.add_(packed.offset)


@lru_cache(maxsize=16)
def nested_map(device: torch.device) -> Tensor:
    """The 256 levels of the 8-bit maxima: the same for every layer, so none of them stores it."""
    with torch.inference_mode(False):  # kept for all later calls, also those that record gradients
        levels: Tensor = dependencies.bitsandbytes("NF4").functional.create_dynamic_map().to(device)
    return levels


def _tensor(found: Tensor) -> Tensor:
    return found
