"""A linear layer whose weight is stored as LLM.int8() stores it: 8 bits and a maximum for each row, by bitsandbytes.

LLM.int8() (Dettmers et al., arXiv 2208.07339) rounds the activations as well, but for outlier features (any value of at
least 6), which meet the dequantized weight in 16 bit. What that computes is not linear in ``x``, so no merged weight
could compute it. Here every feature goes that way: ``y = x deq(W)^T + b``, which bitsandbytes computes on the CPU too,
and whose gradient is the one that it propagates on CUDA. The memory is that of LLM.int8(), the time that of a
product in the compute dtype.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from typing_extensions import Self

from lightning_lora import dependencies
from lightning_lora.nn.pieces import rows_at_once
from lightning_lora.quantization.config import Int8Config
from lightning_lora.quantization.frozen_linear import FrozenLinear

_STEP = 7.874015718698502e-3  # 1 / 127 as bitsandbytes writes it


class Int8Linear(FrozenLinear[Int8Config]):
    """``W_oi = code_oi m_o / 127``, bit for bit bitsandbytes'.

    Attributes:
        codes: ``int8`` of shape ``(O, I)``.
        absmax: ``float32`` bits of the absolute maximum of each row, of shape ``(O,)``.
    """

    tensors = ("codes", "absmax")

    codes: Tensor
    absmax: Tensor

    @classmethod
    def from_linear(cls, layer: nn.Linear, config: Int8Config, *, weight: Tensor | None = None) -> Self:
        """Quantize a layer's weight, or another one in its place; the layer stays as it is and its bias is shared."""
        functional = dependencies.bitsandbytes("INT8").functional
        weight = layer.weight.detach() if weight is None else weight
        codes, absmax, _ = functional.int8_vectorwise_quant(weight.contiguous().half())
        packed = {"codes": codes, "absmax": absmax.view(torch.int32)}
        made = cls(tuple(codes.shape), config, packed, bias=layer.bias, source_dtype=layer.weight.dtype)
        return made.train(layer.training)

    @classmethod
    def from_linear8bit(cls, layer: Any) -> Self:
        """Take over codes and maxima of a quantized ``bitsandbytes.nn.Linear8bitLt`` as they are."""
        maxima = layer.weight.SCB if layer.weight.SCB is not None else layer.state.SCB
        packed = {"codes": layer.weight.data, "absmax": maxima.float().view(torch.int32)}
        shape = (layer.out_features, layer.in_features)
        dtype = torch.float16 if layer.bias is None else layer.bias.dtype
        return cls(shape, Int8Config(), packed, bias=layer.bias, source_dtype=dtype).train(layer.training)

    @classmethod
    def refusal_of_values(cls, weight: Tensor) -> str | None:
        """Bitsandbytes rounds to ``float16`` first, which ends at 65504."""
        if not weight.is_meta and weight.numel() and weight.abs().amax() > torch.finfo(torch.float16).max:
            return "its weight has values beyond 65504, the largest of float16, from which INT8 is rounded"
        return super().refusal_of_values(weight)

    def dequantize(self, dtype: torch.dtype) -> Tensor:
        """Return the weight of shape ``(O, I)`` that :meth:`forward` multiplies with when it computes in ``dtype``."""
        return self._dequantize(slice(None), dtype)

    def pieces(self, dtype: torch.dtype) -> Iterator[Tensor]:
        """Yield the rows of :meth:`dequantize` in order."""
        count = rows_at_once(self.codes.shape)
        for begin in range(0, self.out_features, count):
            yield self._dequantize(slice(begin, begin + count), dtype)

    def _dequantize(self, rows: slice, dtype: torch.dtype) -> Tensor:
        maxima = self.absmax.view(torch.float32)[rows, None]
        return (self.codes[rows] * maxima).mul_(_STEP).to(dtype)
