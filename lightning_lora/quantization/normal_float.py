"""A linear layer whose weight is stored in NormalFloat of two or three bits: packed and dequantized in plain torch."""

from __future__ import annotations

import torch
from torch import Tensor

from lightning_lora.kernels import normal_float
from lightning_lora.kernels.codebook import dequantize_codebook
from lightning_lora.kernels.packed import Packed
from lightning_lora.quantization.codebook import CodebookLinear
from lightning_lora.quantization.config import CodebookConfig


class NormalFloatLinear(CodebookLinear):
    """NF3 or NF2, as its config says; the levels are those of :mod:`lightning_lora.kernels.normal_float`."""

    @classmethod
    def _quantize(cls, flat: Tensor, config: CodebookConfig) -> tuple[Tensor, Tensor]:
        return normal_float.quantize(flat, config.bits, config.block_size)

    def _dequantize(self, packed: Packed, shape: tuple[int, int], dtype: torch.dtype) -> Tensor:
        return dequantize_codebook(packed, self.config.name, shape, dtype)
