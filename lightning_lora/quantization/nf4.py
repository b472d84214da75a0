"""A linear layer whose weight is stored in NF4: packed by bitsandbytes, dequantized by an operator of our own."""

from __future__ import annotations

import torch
from torch import Tensor

from lightning_lora.kernels.nf4 import dequantize_nf4
from lightning_lora.kernels.packed import Packed
from lightning_lora.quantization.four_bits import FourBitLinear


class NF4Linear(FourBitLinear):
    """4-bit NormalFloat, see :class:`~lightning_lora.quantization.config.NF4Config`; bit for bit bitsandbytes'."""

    def _dequantize(self, packed: Packed, shape: tuple[int, int], dtype: torch.dtype) -> Tensor:
        return dequantize_nf4(packed, shape, dtype)
