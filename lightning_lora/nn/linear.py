"""Linear layers: ``nn.Linear``, quantized ones, and Hugging Face's ``Conv1D``, which stores its weight transposed."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from lightning_lora.nn.functional import add_low_rank
from lightning_lora.nn.kind import Kind


@dataclass(frozen=True)
class LinearKind(Kind):
    """``y = W x + b``.

    Attributes:
        transposed: Whether the layer stores ``W^T`` of shape ``(I, O)``.
    """

    name: ClassVar[str] = "linear"

    transposed: bool = False

    def add_low_rank(self, y: Tensor, x: Tensor, lora_A: Tensor, lora_B: Tensor, scaling: float) -> Tensor:
        """Return ``y + s (x A^T) B^T``."""
        return add_low_rank(y, x, lora_A, lora_B, scaling)

    def along_outputs(self, vector: Tensor, y: Tensor) -> Tensor:
        """The features of a linear layer are its last axis."""
        return vector

    def to_matrix(self, weight: Tensor) -> Tensor:
        """Turn the weight the right way round."""
        return weight.t() if self.transposed else weight

    def from_matrix(self, matrix: Tensor) -> Tensor:
        """Turn it back."""
        return matrix.t().contiguous() if self.transposed else matrix
