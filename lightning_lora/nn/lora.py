"""LoRA: ``LoRAConfig`` says what to build, ``LoRA`` is the adapter."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn

from lightning_lora.nn.adapter import Adapter
from lightning_lora.nn.functional import delta
from lightning_lora.nn.kind import Kind
from lightning_lora.nn.kinds import kind_of
from lightning_lora.nn.low_rank import LowRankConfig, draw_factors


@dataclass(frozen=True, kw_only=True, slots=True)
class LoRAConfig(LowRankConfig):
    """Low-rank adaptation (Hu et al., arXiv 2106.09685): ``h = W x + s B A D(x)`` with ``A: (R, I)``, ``B: (O, R)``.

    Args:
        r: Rank ``R``, at least 1 and at most ``min(I, O)`` of every layer it is put on.
        alpha: Numerator of the scaling ``s``. It acts much like a learning rate; when ``r`` changes, ``s`` changes with
            it.
        dropout: Probability with which ``D`` zeroes an element of the adapter's input while training.
        init: ``"kaiming"`` or ``"gaussian"``, see :mod:`lightning_lora.nn.init`.
        scaling: ``"standard"``: ``s = alpha / r``; ``"rslora"``: ``s = alpha / sqrt(r)`` (arXiv 2312.03732).

    Raises:
        TypeError: If a number is not one.
        ValueError: If a value is out of range; the message says which are not.
    """

    method: ClassVar[str] = "lora"

    def build(self, base_layer: nn.Module, *, device: torch.device, dtype: torch.dtype) -> LoRA:
        """Make a fresh :class:`LoRA` for ``base_layer``."""
        return LoRA(self, kind_of(base_layer), device=device, dtype=dtype)


class LoRA(Adapter):
    """One LoRA on one layer: ``y' = y + s B A phi(D(x))``, on a linear layer ``y + s (D(x) A^T) B^T``.

    Attributes:
        lora_A: Down projection of shape ``(R, I)``, random at the start (over an embedding zero).
        lora_B: Up projection of shape ``(O, R)``, zero at the start (over an embedding random).
    """

    up = ("lora_B",)

    config: LoRAConfig

    def __init__(self, config: LoRAConfig, kind: Kind, *, device: torch.device, dtype: torch.dtype) -> None:
        super().__init__()
        self.config = config
        self.kind = kind
        self.lora_A = nn.Parameter(torch.empty(config.r, kind.in_features, device=device, dtype=dtype))
        self.lora_B = nn.Parameter(torch.empty(kind.out_features, config.r, device=device, dtype=dtype))
        self.reset_parameters()

    def forward(self, x: Tensor, y: Tensor, base_layer: nn.Module) -> Tensor:
        """Map input and base output to the adapted output."""
        if self.training and self.config.dropout > 0:
            x = self.kind.drop(x, self.config.dropout)
        return self.kind.add_low_rank(y, x, self.lora_A, self.lora_B, self.config.scale)

    def merged(self, weight: Tensor) -> Tensor:
        """Return ``W + s B A`` in ``weight``'s dtype."""
        return weight + self.kind.from_matrix(delta(self.lora_A, self.lora_B, self.config.scale, weight.dtype))

    def reset_parameters(self) -> None:
        """Draw one factor and zero the other."""
        draw_factors(self.config, self.kind, self.lora_A, self.lora_B)

    def extra_repr(self) -> str:
        """The hyperparameters, for ``print(model)``."""
        return str(self.config)
