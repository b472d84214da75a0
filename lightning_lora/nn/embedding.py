"""Embeddings: a row of the weight for each token."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor
from torch.nn import functional as F

from lightning_lora.nn.kind import Kind


@dataclass(frozen=True)
class EmbeddingKind(Kind):
    """``y = W e(token)`` with ``W: (D, V)``; the layer stores ``W^T``, one row per token.

    ``A`` has a column per token and starts at zero (as in the LoRA paper's own code), so tokens that are never seen
    stay where they are.

    Attributes:
        padding_idx: A token whose column of ``A`` is never trained.
    """

    name: ClassVar[str] = "embedding"
    zero_factor: ClassVar[str] = "lora_A"

    padding_idx: int | None = None

    @property
    def stores_rows(self) -> bool:
        """No: the first axis is that of the tokens."""
        return False

    def add_low_rank(self, y: Tensor, x: Tensor, lora_A: Tensor, lora_B: Tensor, scaling: float) -> Tensor:
        """Return ``y + s A[:, tokens]^T B^T``: the columns of ``A`` are looked up, as the base's rows are."""
        down = F.embedding(x, lora_A.t(), padding_idx=self.padding_idx).to(y.dtype)
        return y + scaling * F.linear(down, lora_B.to(y.dtype))

    def along_outputs(self, vector: Tensor, y: Tensor) -> Tensor:
        """The features of an embedding are its last axis."""
        return vector

    def has_batch(self, x: Tensor) -> bool:
        """Tokens have no features."""
        return x.dim() > 0

    def drop(self, x: Tensor, p: float) -> Tensor:
        """Tokens are no numbers: nothing is dropped."""
        return x

    def to_matrix(self, weight: Tensor) -> Tensor:
        """Return ``(D, V)``."""
        return weight.t()

    def from_matrix(self, matrix: Tensor) -> Tensor:
        """Return ``(V, D)``."""
        return matrix.t().contiguous()
