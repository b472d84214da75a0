"""Weights a few rows at a time: what is computed from so many stays in the processor's cache, and is freed and reused.

A merge of a whole layer in ``float32`` spends most of its time on fresh memory that the kernel has to clear first.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence

import torch
from torch import Tensor

_ELEMENTS = 2**21
_ROWS = 64  # of what is left over from such numbers of rows, libraries round the sums otherwise

PieceMerger = Callable[[Tensor, slice], Tensor]
"""Takes rows of a weight as its layer stores it, to write to, and which these are; returns those of the merged one."""


def rows_at_once(shape: Sequence[int], *, multiple: int = 1) -> int:
    """Return how many rows of a weight of this shape are a piece.

    Args:
        shape: Of the weight, rows first.
        multiple: What the count has to be a multiple of.
    """
    row, multiple = max(1, math.prod(shape[1:])), math.lcm(multiple, _ROWS)
    return max(1, _ELEMENTS // (row * multiple)) * multiple


def joined(pieces: Iterable[Tensor], rows: int) -> Tensor:
    """Return the weight of so many rows whose pieces these are; itself where it is one piece."""
    weight, begin = None, 0
    for piece in pieces:
        if len(piece) == rows:
            return piece
        weight = piece.new_empty(rows, *piece.shape[1:]) if weight is None else weight
        weight[begin : begin + len(piece)] = piece
        begin += len(piece)
    assert weight is not None
    return weight


def pieces_of(weight: Tensor, dtype: torch.dtype) -> Iterator[Tensor]:
    """Yield the rows of a weight in order, piece by piece, in ``dtype``."""
    for piece in torch.split(weight, rows_at_once(weight.shape)):
        yield piece.to(dtype)
