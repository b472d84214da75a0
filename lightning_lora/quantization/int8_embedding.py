"""An embedding whose weight is stored as :class:`~lightning_lora.quantization.int8.Int8Linear` stores its own.

A token's row has one maximum, so a look-up reads the rows it gives and nothing else: the whole weight is made
only where something reads or merges it.
"""

from __future__ import annotations

from torch import Tensor, nn
from torch.nn import functional as F

from lightning_lora.nn.embedding import EmbeddingKind
from lightning_lora.quantization.config import Int8Config
from lightning_lora.quantization.int8 import Int8Linear, dequantize_rows


class Int8Embedding(Int8Linear):
    """``y = W_t = code_t m_t / 127`` for a token ``t``: 8 bits per weight and 32 per token.

    It gives what the embedding would have given: the dtype its weight would have in this model, under autocast too.

    Attributes:
        codes: ``int8`` of shape ``(V, D)``.
        absmax: ``float32`` bits of the absolute maximum of each row, of shape ``(V,)``.
        num_embeddings: ``V``.
        embedding_dim: ``D``.
        padding_idx: A token whose row is never trained, or None.
    """

    padding_idx: int | None

    @classmethod
    def from_embedding(cls, layer: nn.Embedding, config: Int8Config) -> Int8Embedding:
        """Quantize an embedding's weight; the layer stays as it is."""
        made = cls._from_rows(layer.weight.detach(), config, bias=None, source_dtype=layer.weight.dtype)
        made.take_after(layer)
        return made.train(layer.training)

    def take_after(self, layer: nn.Module) -> None:
        """Be a table of that many tokens."""
        assert isinstance(layer, nn.Embedding)
        self.in_features, self.out_features = layer.num_embeddings, layer.embedding_dim
        self.padding_idx = layer.padding_idx

    @property
    def num_embeddings(self) -> int:
        """How many tokens there are."""
        return self.in_features

    @property
    def embedding_dim(self) -> int:
        """The width of a row."""
        return self.out_features

    @property
    def kind(self) -> EmbeddingKind:
        """That of an embedding."""
        return EmbeddingKind(self.in_features, self.out_features, padding_idx=self.padding_idx)

    def dense(self) -> nn.Module:
        """Return an embedding on the meta device."""
        return nn.Embedding(self.in_features, self.out_features, padding_idx=self.padding_idx, device="meta")

    def forward(self, x: Tensor) -> Tensor:
        """Map tokens ``(...)`` to their rows ``(..., D)``."""
        maxima = F.embedding(x, self.absmax[:, None])
        return dequantize_rows(F.embedding(x, self.codes), maxima, self.merge_dtype)

    def extra_repr(self) -> str:
        """Sizes and storage, for ``print(model)``."""
        return f"{self.in_features}, {self.out_features}, {self.storage}"
