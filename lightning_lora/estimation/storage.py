"""How many bytes a frozen weight takes in few bits, and a linear layer that has that size and no values.

Layers of any storage can stand in a model that is estimated: what is multiplied with is made for each product, as a
dequantized weight is.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lightning_lora.nn.base import QuantizedLinear
from lightning_lora.nn.kind import Kind
from lightning_lora.nn.linear import LinearKind

_NESTED_BLOCK = 256  # maxima that share one of their own
_FLOAT = 4


class Storage(ABC):
    """How a weight of shape ``(O, I)`` is stored."""

    @property
    @abstractmethod
    def name(self) -> str:
        """In a few words: ``nf4/64 double-quantized``."""

    @abstractmethod
    def bytes(self, out_features: int, in_features: int) -> int:
        """Codes and all constants of a weight."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Blockwise(Storage):
    """NormalFloat: codes of a few bits, and a maximum for each block (QLoRA, arXiv 2305.14314, section 3).

    With double quantization ``bits + 8/64 + 32/(64 * 256)`` bits per weight, 4.127 for 4 bits; else ``bits + 32/64``.

    Args:
        bits: Of a code: 2, 3 or 4.
        block_size: Weights that share a maximum.
        double_quant: Whether the maxima are in 8 bits, with a mean, and a ``float32`` per 256 of them.
    """

    bits: int = 4
    block_size: int = 64
    double_quant: bool = True

    @property
    def name(self) -> str:
        """As :attr:`lightning_lora.NF4Config.storage` says it."""
        return f"nf{self.bits}/{self.block_size}" + (" double-quantized" if self.double_quant else "")

    def bytes(self, out_features: int, in_features: int) -> int:
        """Codes packed without gaps, then the constants."""
        weights = out_features * in_features
        codes, blocks = -(-weights * self.bits // 8), -(-weights // self.block_size)
        constants = blocks + _FLOAT * (-(-blocks // _NESTED_BLOCK) + 1) if self.double_quant else _FLOAT * blocks
        return codes + constants


@dataclass(frozen=True, slots=True)
class Rowwise(Storage):
    """A byte for each weight and a ``float32`` scale for each output (LLM.int8, arXiv 2208.07339, section 2.1)."""

    @property
    def name(self) -> str:
        """The word for it."""
        return "int8"

    def bytes(self, out_features: int, in_features: int) -> int:
        """Codes and scales."""
        return out_features * in_features + _FLOAT * out_features


STORAGES: dict[int, Storage] = {8: Rowwise(), 4: Blockwise(bits=4), 3: Blockwise(bits=3), 2: Blockwise(bits=2)}
"""What ``qlora-8bit`` to ``qlora-2bit`` store the base in."""


class Sized(QuantizedLinear):
    """A frozen linear layer that holds as many bytes as its weight takes, and computes tensors of the right sizes.

    Attributes:
        codes: As many bytes as codes and constants are together.
    """

    codes: Tensor

    def __init__(self, layer: nn.Linear, storage: Storage) -> None:
        super().__init__()
        self.in_features, self.out_features = layer.in_features, layer.out_features
        self._storage = storage
        size = storage.bytes(layer.out_features, layer.in_features)
        self.register_buffer("codes", torch.empty(size, dtype=torch.uint8, device=layer.weight.device))
        self.register_buffer("_like", layer.weight.new_empty(0), persistent=False)
        self.register_parameter("bias", layer.bias)

    def forward(self, x: Tensor) -> Tensor:
        """Map ``(..., I)`` to ``(..., O)``."""
        return F.linear(x, self.matrix(x.dtype), self.bias)

    def dequantize(self, dtype: torch.dtype) -> Tensor:
        """Return a new tensor of shape ``(O, I)``."""
        return torch.empty(self.out_features, self.in_features, dtype=dtype, device=self.device)

    @property
    def storage(self) -> str:
        """That of the weight it stands for."""
        return self._storage.name

    @property
    def merge_dtype(self) -> torch.dtype:
        """The dtype of the layer it stands for, or what the model was cast to since."""
        like = self._like
        assert isinstance(like, Tensor)
        return like.dtype

    @property
    def device(self) -> torch.device:
        """Where the codes are."""
        return self.codes.device

    @property
    def kind(self) -> Kind:
        """That of a linear layer."""
        return LinearKind(self.in_features, self.out_features)
