"""What all block-wise codebooks share: codes, one maximum for each block, and double quantization of the maxima.

A format says how a piece of a weight is rounded to its levels, and how codes become a weight again.
"""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Iterator

import torch
from torch import Tensor, nn
from typing_extensions import Self

from lightning_lora import dependencies
from lightning_lora.kernels.packed import DTYPES, NESTED_BLOCK, Packed
from lightning_lora.nn.pieces import rows_at_once
from lightning_lora.quantization.config import CodebookConfig
from lightning_lora.quantization.frozen_linear import FrozenLinear

_CPU_PIECE = 2**18  # weights packed at once on the CPU; a multiple of every block size


class CodebookLinear(FrozenLinear[CodebookConfig]):
    """A linear layer of ``w = level[code] m`` with one maximum ``m`` for each block of weights.

    Attributes:
        codes: Packed codes; ``uint8``.
        absmax: Maximum of each block: ``float32`` bits, or 8-bit codes when double-quantized.
        nested_absmax: ``float32`` bits of one maximum per 256 of those; empty unless double-quantized.
        offset: ``float32`` bits of the mean that double quantization takes off first; empty unless double-quantized.
    """

    tensors = ("codes", "absmax", "nested_absmax", "offset")

    codes: Tensor
    absmax: Tensor
    nested_absmax: Tensor
    offset: Tensor

    @classmethod
    def from_linear(cls, layer: nn.Linear, config: CodebookConfig, *, weight: Tensor | None = None) -> Self:
        """Quantize a layer's weight, or another one in its place; the layer stays as it is and its bias is shared."""
        flat = (layer.weight.detach() if weight is None else weight).reshape(-1)
        codes, absmax = cls._pack(flat, config)
        nested_absmax = offset = torch.empty(0, device=flat.device)
        if config.double_quant:  # QLoRA, section 3: the maxima are positive, so their mean is taken off first
            functional = dependencies.bitsandbytes("double quantization").functional
            offset = absmax.mean()
            absmax, state = functional.quantize_blockwise(absmax - offset, blocksize=NESTED_BLOCK)
            nested_absmax = state.absmax
        return cls(
            (layer.out_features, layer.in_features),
            config,
            cls._tensors(codes, absmax, nested_absmax, offset),
            bias=layer.bias,
            source_dtype=layer.weight.dtype,
        ).train(layer.training)

    def dequantize(self, dtype: torch.dtype) -> Tensor:
        """Return the weight of shape ``(O, I)`` that :meth:`forward` multiplies with when it computes in ``dtype``."""
        return self._dequantize(self.packed, self._shape, dtype if dtype in DTYPES else torch.float32).to(dtype)

    def pieces(self, dtype: torch.dtype) -> Iterator[Tensor]:
        """Yield the rows of :meth:`dequantize` in order; a piece ends where a block does, nested ones included."""
        whole, columns, block_size = self.packed, self.in_features, self.config.block_size
        nested = block_size * NESTED_BLOCK if whole.nested else block_size
        count = rows_at_once(self._shape, multiple=nested // math.gcd(nested, columns))
        for begin in range(0, self.out_features, count):
            rows = min(count, self.out_features - begin)
            part = whole.part(begin * columns, rows * columns, self.config.bits)
            yield self._dequantize(part, (rows, columns), dtype if dtype in DTYPES else torch.float32).to(dtype)

    @property
    def packed(self) -> Packed:
        """Codes and constants as the kernels take them."""
        return Packed(self.codes, self.absmax, self.nested_absmax, self.offset, self.config.block_size)

    @property
    def _shape(self) -> tuple[int, int]:
        return self.out_features, self.in_features

    @classmethod
    @abstractmethod
    def _quantize(cls, flat: Tensor, config: CodebookConfig) -> tuple[Tensor, Tensor]:
        """Return packed codes and the maximum of each block, in ``float32``, of a flat piece in one of ``DTYPES``."""

    @abstractmethod
    def _dequantize(self, packed: Packed, shape: tuple[int, int], dtype: torch.dtype) -> Tensor:
        """Return a weight, this one or some of its rows, in one of ``DTYPES``."""

    @classmethod
    def _pack(cls, flat: Tensor, config: CodebookConfig) -> tuple[Tensor, Tensor]:
        """Return codes and block maxima of a flat weight.

        On the CPU rounding to levels makes up to 14 bytes of temporaries for each weight at once, so it gets pieces.
        """
        count, bits, block_size = flat.numel(), config.bits, config.block_size
        piece = _CPU_PIECE if flat.device.type == "cpu" else max(count, 1)
        codes = torch.empty(-(-count * bits // 8), dtype=torch.uint8, device=flat.device)
        absmax = torch.empty(-(-count // block_size), dtype=torch.float32, device=flat.device)
        for start in range(0, count, piece):
            part = flat[start : start + piece]
            packed, maxima = cls._quantize(part if part.dtype in DTYPES else part.float(), config)
            byte, block = start * bits // 8, start // block_size
            codes[byte : byte + packed.numel()] = packed.reshape(-1)
            absmax[block : block + maxima.numel()] = maxima
        return codes, absmax

    @classmethod
    def _tensors(cls, codes: Tensor, absmax: Tensor, nested_absmax: Tensor, offset: Tensor) -> dict[str, Tensor]:
        """The packed tensors by name; floats become the bits that no cast rounds."""
        constants = (absmax, nested_absmax.reshape(-1), offset.reshape(-1))
        bits = (t if t.dtype == torch.uint8 else t.float().view(torch.int32) for t in constants)
        return dict(zip(cls.tensors, (codes.reshape(-1), *bits), strict=True))
