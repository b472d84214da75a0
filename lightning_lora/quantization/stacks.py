"""Stacked weights of experts in few bits: one set of codes for all experts, in any storage of linear layers."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from typing_extensions import Self

from lightning_lora.nn.experts import ExpertsKind, StackedWeight, experts_kind
from lightning_lora.nn.pieces import pieces_of
from lightning_lora.quantization.config import (
    FP4Config,
    Int8Config,
    NF2Config,
    NF3Config,
    NF4Config,
    QuantizationConfig,
)
from lightning_lora.quantization.fp4 import FP4Linear
from lightning_lora.quantization.frozen_linear import FrozenLinear
from lightning_lora.quantization.int8 import Int8Linear
from lightning_lora.quantization.nf4 import NF4Linear
from lightning_lora.quantization.normal_float import NormalFloatLinear


class Stack(FrozenLinear[Any]):
    """A parameter of shape ``(E, ...)`` whose matrices are stored one below the other as one linear layer's weight.

    It is read, as a whole, and not called. Each storage has a class of its own, which derives from this and from the
    storage's linear layer.

    Attributes:
        shape: Of the parameter.
        transposed: Whether it holds ``W_e^T``.
    """

    shape: tuple[int, ...]
    transposed: bool

    @classmethod
    def from_stack(cls, layer: StackedWeight, config: QuantizationConfig) -> Self:
        """Quantize a stack; it is left as it is."""
        rows = layer.weight.detach().flatten(0, 1)
        flat = nn.Linear(rows.shape[1], rows.shape[0], bias=False, device="meta")
        flat.weight = nn.Parameter(rows, requires_grad=False)
        stack = cls.from_linear(flat.train(layer.training), config)
        stack.take_after(layer)
        return stack

    def take_after(self, layer: nn.Module) -> None:
        """Be the parameter that a stack holds."""
        assert isinstance(layer, StackedWeight)
        self.shape, self.transposed = tuple(layer.weight.shape), layer.transposed

    @property
    def kind(self) -> ExpertsKind:
        """The sizes of one expert, and how many there are."""
        return experts_kind(self.shape, transposed=self.transposed)

    def dense(self) -> nn.Module:
        """Return a stack on the meta device."""
        return StackedWeight(nn.Parameter(torch.empty(self.shape, device="meta")), transposed=self.transposed)

    def dequantize(self, dtype: torch.dtype) -> Tensor:
        """Return the whole parameter in ``dtype``."""
        rows = super().dequantize(dtype)  # type: ignore[safe-super]  # that of the storage, which comes next
        return rows.view(self.shape)

    def pieces(self, dtype: torch.dtype) -> Iterator[Tensor]:
        """Yield the experts in order, a few at a time."""
        yield from pieces_of(self.dequantize(dtype), dtype)

    def forward(self, x: Tensor) -> Tensor:
        """Raise: there is no call with an input."""
        raise TypeError("a stack of experts is read, not called")

    def extra_repr(self) -> str:
        """Shape and storage, for ``print(model)``."""
        return f"{self.shape}, {self.storage}"


class NF4Stack(Stack, NF4Linear):
    """Experts in NF4."""


class FP4Stack(Stack, FP4Linear):
    """Experts in FP4."""


class NormalFloatStack(Stack, NormalFloatLinear):
    """Experts in NF3 or NF2."""


class Int8Stack(Stack, Int8Linear):
    """Experts in 8 bit, with a maximum for each row of each matrix as it is stored."""


_STACKS: dict[type[QuantizationConfig], type[Stack]] = {
    NF4Config: NF4Stack,
    FP4Config: FP4Stack,
    NF3Config: NormalFloatStack,
    NF2Config: NormalFloatStack,
    Int8Config: Int8Stack,
}


def stack_class(config: QuantizationConfig) -> type[Stack]:
    """The stack that stores its weight as a config says."""
    return _STACKS[type(config)]


def rows_and_columns(layer: StackedWeight) -> tuple[int, int]:
    """The shape of the matrices of a stack one below the other."""
    experts, rows, columns = layer.weight.shape
    return experts * rows, columns
