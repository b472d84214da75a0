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
from torch._subclasses.fake_tensor import FakeTensor
from typing_extensions import Self

from lightning_lora import dependencies
from lightning_lora.nn.pieces import rows_at_once
from lightning_lora.quantization.config import Int8Config
from lightning_lora.quantization.frozen_linear import FrozenLinear

_STEP = 7.874015718698502e-3  # 1 / 127 as bitsandbytes writes it
_PIECE, _LARGE = {"cpu": 2**16}, 2**24
"""Weights that are in float32 at once: what stays in a core's cache, or 64 MiB; an output head would take GiBs."""


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
        weight = layer.weight.detach() if weight is None else weight
        made = cls._from_rows(weight, config, bias=layer.bias, source_dtype=layer.weight.dtype)
        return made.train(layer.training)

    @classmethod
    def _from_rows(
        cls, weight: Tensor, config: Int8Config, *, bias: nn.Parameter | None, source_dtype: torch.dtype
    ) -> Self:
        functional = dependencies.bitsandbytes("INT8").functional
        codes, absmax, _ = functional.int8_vectorwise_quant(weight.contiguous().half())
        packed = {"codes": codes, "absmax": absmax.view(torch.int32)}
        return cls((codes.shape[0], codes.shape[1]), config, packed, bias=bias, source_dtype=source_dtype)

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
        maxima = self.absmax[:, None]
        if torch.compiler.is_compiling():  # one loop of its own making
            return dequantize_rows(self.codes, maxima, dtype)
        out = torch.empty(self.codes.shape, dtype=dtype, device=self.codes.device)
        rows = max(1, _PIECE.get(self.codes.device.type, _LARGE) // max(1, out.shape[1]))
        starts = range(0, len(out), rows)
        # Where there are no values but what an operation allocates is counted, the first piece stands for all.
        for start in starts[:1] if isinstance(self.codes, FakeTensor) else starts:
            part = slice(start, start + rows)
            out[part] = dequantize_rows(self.codes[part], maxima[part], torch.float32)
        return out

    def pieces(self, dtype: torch.dtype) -> Iterator[Tensor]:
        """Yield the rows of :meth:`dequantize` in order."""
        count = rows_at_once(self.codes.shape)
        for begin in range(0, len(self.codes), count):
            part = slice(begin, begin + count)
            yield dequantize_rows(self.codes[part], self.absmax[part, None], dtype)


def dequantize_rows(codes: Tensor, maxima: Tensor, dtype: torch.dtype) -> Tensor:
    """Return ``code m / 127`` in ``float32``, rounded to ``dtype`` once.

    Args:
        codes: ``int8`` of shape ``(..., I)``.
        maxima: ``float32`` bits of shape ``(..., 1)``.
        dtype: Of the result.
    """
    return (codes * maxima.view(torch.float32)).mul_(_STEP).to(dtype)
