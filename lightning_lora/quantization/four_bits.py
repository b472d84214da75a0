"""What NF4 and FP4 share: bitsandbytes packs them, two codes to a byte, on CPU and CUDA.

``bitsandbytes.nn.Linear4bit`` keeps its constants outside the module's tensors and, on CPUs with AVX512-BF16, repacks
its weight in place at the first evaluation, after which no gradient passes through it and dequantizing gives another
weight. Here packed codes and constants are ordinary buffers and nothing ever rewrites them.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from typing_extensions import Self

from lightning_lora import dependencies
from lightning_lora.quantization.codebook import CodebookLinear
from lightning_lora.quantization.config import CodebookConfig


class FourBitLinear(CodebookLinear):
    """A linear layer over codes of bitsandbytes: the even element in the high half of each byte."""

    @classmethod
    def from_state(
        cls, codes: Tensor, state: Any, config: CodebookConfig, *, bias: nn.Parameter | None, source_dtype: torch.dtype
    ) -> Self:
        """Take over packed codes and a ``bitsandbytes.functional.QuantState`` as they are."""
        empty = torch.empty(0, device=codes.device)
        nested_absmax, offset = (state.state2.absmax, state.offset) if state.nested else (empty, empty)
        packed = cls._tensors(codes, state.absmax, nested_absmax, offset)
        return cls((state.shape[0], state.shape[1]), config, packed, bias=bias, source_dtype=source_dtype)

    @classmethod
    def refusal(cls, weight: Tensor, device: torch.device) -> str | None:
        """There are kernels for the CPU and CUDA, and on the CPU rows have to be whole bytes."""
        if device.type == "cpu" and weight.shape[-1] % 2:
            return f"in_features={weight.shape[-1]} is odd, which the CPU kernel cannot pack"
        return super().refusal(weight, device)

    @classmethod
    def _quantize(cls, flat: Tensor, config: CodebookConfig) -> tuple[Tensor, Tensor]:
        functional = dependencies.bitsandbytes(config.name.upper()).functional
        codes, state = functional.quantize_4bit(flat, blocksize=config.block_size, quant_type=config.name)
        return codes, state.absmax
