"""Linear layers: ``nn.Linear``, quantized ones, and Hugging Face's ``Conv1D``, which stores its weight transposed."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import ClassVar

import torch
from torch import Tensor, nn

from lightning_lora.nn.base import QuantizedLinear, is_called_as_it_is, stored_weight
from lightning_lora.nn.functional import add_low_rank
from lightning_lora.nn.kind import Kind
from lightning_lora.nn.split_linear import (
    Frozen,
    Settings,
    adapted_linear,
    can_split,
    compute_dtype,
    is_plain_and_frozen,
)


@dataclass(frozen=True)
class LinearKind(Kind):
    """``y = W x + b``.

    Attributes:
        transposed: Whether the layer stores ``W^T`` of shape ``(I, O)``.
    """

    name: ClassVar[str] = "linear"

    transposed: bool = False

    @property
    def stores_rows(self) -> bool:
        """Not where it is transposed."""
        return not self.transposed

    def add_low_rank(self, y: Tensor, x: Tensor, lora_A: Tensor, lora_B: Tensor, scaling: float) -> Tensor:
        """Return ``y + s (x A^T) B^T``."""
        return add_low_rank(y, x, lora_A, lora_B, scaling)

    def over(
        self, base_layer: nn.Module, x: Tensor, lora_A: Tensor, lora_B: Tensor, scaling: float, p: float
    ) -> Tensor:
        """Return ``W x + b + s B A D(x)``, as two autograd nodes where nothing stands in the way of that."""
        if can_split(x, lora_A, lora_B):
            settings = Settings(scaling, p, compute_dtype(x))
            frozen = self._frozen(base_layer, settings.dtype)
            if frozen is not None:
                return adapted_linear(x, frozen, lora_A, lora_B, settings)
        return super().over(base_layer, x, lora_A, lora_B, scaling, p)

    def _frozen(self, base_layer: nn.Module, dtype: torch.dtype) -> Frozen | None:
        """Return what a call multiplies with in ``dtype`` and adds, or None where only the layer itself can say."""
        if not is_called_as_it_is(base_layer):
            return None
        if isinstance(base_layer, QuantizedLinear):
            if base_layer.computes_in(dtype) != dtype:
                return None
            return Frozen(partial(base_layer.matrix, dtype), base_layer.bias, updated=base_layer.updated())
        weight = stored_weight(base_layer)
        if not is_plain_and_frozen(weight, dtype):
            return None
        return Frozen(partial(self._matrix, weight.detach(), dtype), base_layer.bias, weight)  # type: ignore[arg-type]

    def _matrix(self, weight: Tensor, dtype: torch.dtype) -> Tensor:
        matrix = self.to_matrix(weight)
        return matrix if matrix.dtype == dtype else matrix.to(dtype)

    def along_outputs(self, vector: Tensor, y: Tensor) -> Tensor:
        """The features of a linear layer are its last axis."""
        return vector

    def to_matrix(self, weight: Tensor) -> Tensor:
        """Turn the weight the right way round."""
        return weight.t() if self.transposed else weight

    def from_matrix(self, matrix: Tensor) -> Tensor:
        """Turn it back."""
        return matrix.t().contiguous() if self.transposed else matrix
