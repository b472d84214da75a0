"""The maxima of blocks under double quantization: 8-bit codes to ``float32``, the same for every codebook."""

from __future__ import annotations

from functools import lru_cache

import torch
from torch import Tensor

from lightning_lora import dependencies
from lightning_lora.kernels.packed import NESTED_BLOCK, Packed


def block_maxima(packed: Packed) -> Tensor:
    """Return the maximum of each block in ``float32``, of shape ``(blocks,)``; constants are ``float32``."""
    if not packed.nested:
        return packed.absmax
    levels = nested_map(packed.absmax.device)
    operator = torch.ops.bitsandbytes.dequantize_blockwise.default
    maxima: Tensor = operator(packed.absmax, packed.nested_absmax, levels, NESTED_BLOCK, torch.float32)
    return maxima.add_(packed.offset)


@lru_cache(maxsize=16)
def nested_map(device: torch.device) -> Tensor:
    """The 256 levels of the 8-bit maxima: the same for every layer, so none of them stores it."""
    with torch.inference_mode(False):  # kept for all later calls, also those that record gradients
        levels: Tensor = dependencies.bitsandbytes("double quantization").functional.create_dynamic_map().to(device)
    return levels
