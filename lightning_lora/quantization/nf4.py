"""A linear layer whose weight is stored in NF4: packed by bitsandbytes, dequantized by an operator of our own."""

from __future__ import annotations

import torch
from torch import Tensor

from lightning_lora.kernels.nf4 import dequantize_nf4, dequantize_nf4_plus
from lightning_lora.kernels.packed import DTYPES, Packed
from lightning_lora.nn.base import Updated
from lightning_lora.quantization.config import NF4Config
from lightning_lora.quantization.four_bits import FourBitLinear


class NF4Linear(FourBitLinear):
    """4-bit NormalFloat, see :class:`~lightning_lora.quantization.config.NF4Config`; bit for bit bitsandbytes'."""

    def _dequantize(self, packed: Packed, shape: tuple[int, int], dtype: torch.dtype) -> Tensor:
        return dequantize_nf4(packed, shape, dtype)

    def updated(self) -> Updated | None:
        """The kernel, where the config asks for it."""
        return self._plus if isinstance(self.config, NF4Config) and self.config.fuse_delta else None

    def _plus(self, lora_A: Tensor, lora_B: Tensor, scaling: float, dtype: torch.dtype) -> Tensor:
        held = dtype if dtype in DTYPES else torch.float32
        A, B = (factor.detach().to(factor.dtype if factor.dtype in DTYPES else held) for factor in (lora_A, lora_B))
        return dequantize_nf4_plus(self.packed, self._shape, held, A, B, scaling).to(dtype)
