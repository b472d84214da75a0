"""The contract between methods and kinds of layers, so that M methods and K kinds are M + K files.

To a method every weight is a matrix ``W`` of shape ``(O, I)``, applied to features of the input: ``y = W phi(x) + b``.
For a linear layer ``phi`` is the identity, for a convolution it takes patches, for an embedding it is the one-hot
vector of a token. A kind says how to do that without ever forming ``phi(x)``.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Any, ClassVar

from torch import Tensor, nn
from torch.nn import functional as F


@dataclass(frozen=True)
class Kind(ABC):
    """How one layer applies its weight: a frozen value, made from the layer once.

    Attributes:
        in_features: ``I``.
        out_features: ``O``.
    """

    name: ClassVar[str]
    zero_factor: ClassVar[str] = "lora_B"
    """Which factor starts at zero. The other one is random."""

    in_features: int
    out_features: int

    @property
    def stores_rows(self) -> bool:
        """Whether the first axis of a weight as the layer stores it is that of the matrix: its outputs."""
        return True

    def check(self, config: Any) -> None:  # noqa: B027 (most take any method)
        """Raise ``ValueError`` if layers of this kind cannot be adapted by what an ``AdapterConfig`` says."""

    @abstractmethod
    def add_low_rank(self, y: Tensor, x: Tensor, lora_A: Tensor, lora_B: Tensor, scaling: float) -> Tensor:
        """Return ``y + s B A phi(x)`` without forming ``B A``.

        Args:
            y: The layer's output so far.
            x: The layer's input.
            lora_A: Of shape ``(R, I)``; cast to ``y``'s dtype.
            lora_B: Of shape ``(O, R)``; cast to ``y``'s dtype.
            scaling: The factor ``s``.
        """

    def over(
        self, base_layer: nn.Module, x: Tensor, lora_A: Tensor, lora_B: Tensor, scaling: float, p: float
    ) -> Tensor:
        """Return ``base_layer(x) + s B A phi(D(x))``: both products at once, where the kind knows a better way.

        Args:
            base_layer: The frozen layer below, not computed yet.
            x: Its input.
            lora_A: Of shape ``(R, I)``; cast to the output's dtype.
            lora_B: Of shape ``(O, R)``; cast to the output's dtype.
            scaling: The factor ``s``.
            p: Probability with which ``D`` zeroes an element.
        """
        y: Tensor = base_layer(x)
        return self.add_low_rank(y, self.drop(x, p) if p > 0 else x, lora_A, lora_B, scaling)

    @abstractmethod
    def along_outputs(self, vector: Tensor, y: Tensor) -> Tensor:
        """Shape a vector of ``O`` elements so that it broadcasts over an output ``y``."""

    def features(self, x: Tensor) -> Tensor:
        """Return ``phi(x)`` as rows, of shape ``(N, I)``: what the weight as a matrix is multiplied with."""
        return x.reshape(-1, self.in_features)

    def has_batch(self, x: Tensor) -> bool:
        """Whether the first axis of an input counts samples, rather than the features of a single one."""
        return x.dim() > 1

    def drop(self, x: Tensor, p: float) -> Tensor:
        """Zero elements of the input with probability ``p``, and scale the rest up."""
        return F.dropout(x, p)

    def to_matrix(self, weight: Tensor) -> Tensor:
        """Return a weight as the layer stores it as the matrix ``(O, I)``."""
        return weight

    def from_matrix(self, matrix: Tensor) -> Tensor:
        """Inverse of :meth:`to_matrix`."""
        return matrix
