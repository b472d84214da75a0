"""Stacked weights of experts in NF4: one set of codes for all experts."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import torch
from torch import Tensor, nn

from lightning_lora.nn.experts import ExpertsKind, StackedWeight, experts_kind
from lightning_lora.nn.pieces import pieces_of
from lightning_lora.quantization.config import NF4Config
from lightning_lora.quantization.nf4 import NF4Linear


class NF4Stack(NF4Linear):
    """A parameter of shape ``(E, ...)`` whose matrices are stored one below the other as one :class:`NF4Linear`.

    It is read, as a whole, and not called.

    Attributes:
        shape: Of the parameter.
        transposed: Whether it holds ``W_e^T``.
    """

    shape: tuple[int, ...]
    transposed: bool

    @classmethod
    def from_stack(cls, layer: StackedWeight, config: NF4Config) -> NF4Stack:
        """Quantize a stack; it is left as it is."""
        return cls.from_linear(_rows(layer), config)._standing_for(layer)

    @classmethod
    def blank(cls, layer: StackedWeight, config: NF4Config) -> NF4Stack:
        """Return one of the size of a stack, without values."""
        rows = _rows(layer)
        layout = config.layout(rows.out_features, rows.in_features)
        packed = {name: layer.weight.new_empty(shape, dtype=dtype) for name, (shape, dtype) in layout.items()}
        shape, dtype = (rows.out_features, rows.in_features), layer.weight.dtype
        blank = cls(shape, config, packed, bias=None, source_dtype=dtype).train(layer.training)
        return blank._standing_for(layer)

    def _standing_for(self, layer: StackedWeight) -> NF4Stack:
        self.shape, self.transposed = tuple(layer.weight.shape), layer.transposed
        return self

    @classmethod
    def of_stack(
        cls, layer: StackedWeight, config: NF4Config, packed: Mapping[str, Tensor], dtype: torch.dtype
    ) -> NF4Stack:
        """Return the stack with these packed tensors; of ``layer`` only the shape is looked at."""
        stack = cls(rows_and_columns(layer), config, packed, bias=None, source_dtype=dtype)
        stack.shape, stack.transposed = tuple(layer.weight.shape), layer.transposed
        return stack.train(layer.training)

    @property
    def kind(self) -> ExpertsKind:
        """The sizes of one expert, and how many there are."""
        return experts_kind(self.shape, transposed=self.transposed)

    def dense(self) -> nn.Module:
        """Return a stack on the meta device."""
        return StackedWeight(nn.Parameter(torch.empty(self.shape, device="meta")), transposed=self.transposed)

    def dequantize(self, dtype: torch.dtype) -> Tensor:
        """Return the whole parameter in ``dtype``."""
        return super().dequantize(dtype).view(self.shape)

    def pieces(self, dtype: torch.dtype) -> Iterator[Tensor]:
        """Yield the experts in order, a few at a time."""
        yield from pieces_of(self.dequantize(dtype), dtype)

    def forward(self, x: Tensor) -> Tensor:
        """Raise: there is no call with an input."""
        raise TypeError("a stack of experts is read, not called")

    def extra_repr(self) -> str:
        """Shape and storage, for ``print(model)``."""
        return f"{self.shape}, {self.storage}"


def _rows(layer: StackedWeight) -> nn.Linear:
    """The matrices one below the other, as one layer."""
    rows = layer.weight.detach().flatten(0, 1)
    flat = nn.Linear(rows.shape[1], rows.shape[0], bias=False, device="meta")
    flat.weight = nn.Parameter(rows, requires_grad=False)
    return flat.train(layer.training)


def rows_and_columns(layer: StackedWeight) -> tuple[int, int]:
    """The shape of the matrices of a stack one below the other."""
    experts, rows, columns = layer.weight.shape
    return experts * rows, columns
