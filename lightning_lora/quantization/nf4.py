"""A linear layer whose weight is stored in NF4: packed by bitsandbytes, dequantized by an operator of our own."""

from __future__ import annotations

import torch
from torch import Tensor

from lightning_lora.kernels.nf4 import dequantize_nf4
from lightning_lora.quantization.four_bits import FourBitLinear


class NF4Linear(FourBitLinear):
    """4-bit NormalFloat, see :class:`~lightning_lora.quantization.config.NF4Config`; bit for bit bitsandbytes'."""

    def _dequantize(self, dtype: torch.dtype) -> Tensor:
        return dequantize_nf4(self.packed, self._shape, dtype)
