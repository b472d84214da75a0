"""The value that all kernels of codebooks take: codes, constants and block size of one weight."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
"""What a weight can be dequantized to."""

NESTED_BLOCK = 256
"""How many block maxima share a constant under double quantization (QLoRA, section 3)."""


def sizes(weights: int, bits: int, block_size: int, *, nested: bool) -> tuple[int, int, int, int]:
    """Return how many bytes of codes, maxima, nested maxima and offsets so many weights have, as in :class:`Packed`."""
    blocks = -(-weights // block_size)
    return -(-weights * bits // 8), blocks, -(-blocks // NESTED_BLOCK) if nested else 0, int(nested)


class Packed(NamedTuple):
    """A weight as codes of levels: ``w = level[code] m``, with one maximum ``m`` for each block of weights.

    Double-quantized, ``m = map[absmax] nested_absmax + offset``. The constants are ``float32``, or ``int32`` with the
    bits of ``float32``, which no cast of a module rounds.

    Attributes:
        codes: ``uint8``. Of 4 bits, two to a byte with the even element in the high half, of shape ``(ceil(N / 2),)``;
            fewer bits stand as :mod:`lightning_lora.kernels.bits` puts them.
        absmax: One constant for each block, or one 8-bit code.
        nested_absmax: One constant for every 256 of the 8-bit codes; else empty.
        offset: A single constant beside 8-bit codes; else empty.
        block_size: Weights that share a maximum.
    """

    codes: Tensor
    absmax: Tensor
    nested_absmax: Tensor
    offset: Tensor
    block_size: int

    @property
    def nested(self) -> bool:
        """Whether the maxima are 8-bit codes."""
        return self.absmax.dtype == torch.uint8

    def as_floats(self) -> Packed:
        """The same with every constant seen as ``float32``."""
        constants = [floats.view(torch.float32) if floats.dtype == torch.int32 else floats for floats in self[1:4]]
        return Packed(self.codes, constants[0], constants[1], constants[2], self.block_size)

    def part(self, begin: int, count: int, bits: int) -> Packed:
        """Return the codes and constants of some weights; they begin where a block does, and a nested one.

        Args:
            begin: Index of the first.
            count: How many there are.
            bits: Of a code.
        """
        blocks = slice(begin // self.block_size, -(-(begin + count) // self.block_size))
        nested = slice(blocks.start // NESTED_BLOCK, -(-blocks.stop // NESTED_BLOCK))
        codes = self.codes[begin * bits // 8 : -(-(begin + count) * bits // 8)]
        return Packed(codes, self.absmax[blocks], self.nested_absmax[nested], self.offset, self.block_size)

    def check(self, shape: Sequence[int], dtype: torch.dtype, bits: int = 4) -> None:
        """Raise ``RuntimeError`` unless this is a weight of that shape: a kernel would read past its end."""
        expected = sizes(math.prod(shape), bits, self.block_size, nested=self.nested)
        found = tuple(tensor.numel() for tensor in self[:4])
        if found != expected:
            raise RuntimeError(
                f"a weight of shape {tuple(shape)} in {bits} bits and blocks of {self.block_size} has {expected} "
                f"bytes of codes, maxima, nested maxima and offsets; got {found}"
            )
        if self.codes.dtype != torch.uint8 or dtype not in DTYPES:
            raise RuntimeError(f"packed codes are uint8 and become one of {DTYPES}; got {self.codes.dtype} and {dtype}")
