"""A linear layer whose weight is stored in FP4: packed and dequantized by bitsandbytes."""

from __future__ import annotations

import torch
from torch import Tensor

from lightning_lora.kernels.codebook import dequantize_codebook
from lightning_lora.kernels.packed import Packed
from lightning_lora.quantization.four_bits import FourBitLinear


class FP4Linear(FourBitLinear):
    """4-bit floating point, see :class:`~lightning_lora.quantization.config.FP4Config`; bit for bit bitsandbytes'."""

    def _dequantize(self, packed: Packed, shape: tuple[int, int], dtype: torch.dtype) -> Tensor:
        return dequantize_codebook(packed, "fp4", shape, dtype)
