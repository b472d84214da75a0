"""LoRA over stacked weights of experts: factors for each expert."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from lightning_lora.nn.adapter import Adapter
from lightning_lora.nn.experts import ExpertsKind
from lightning_lora.nn.init import INITIALIZERS
from lightning_lora.nn.pieces import PieceMerger

if TYPE_CHECKING:
    from lightning_lora.nn.lora import LoRAConfig


class ExpertLoRA(Adapter):
    """``W_e' = W_e + s B_e A_e`` for each expert ``e``. What is computed with ``W'`` is the code of the module around.

    Attributes:
        lora_A: Down projections of shape ``(E, R, I)``, random at the start.
        lora_B: Up projections of shape ``(E, O, R)``, zero at the start.
    """

    up = ("lora_B",)

    config: LoRAConfig
    kind: ExpertsKind

    def __init__(self, config: LoRAConfig, kind: ExpertsKind, *, device: torch.device, dtype: torch.dtype) -> None:
        super().__init__()
        kind.check(config)
        self.config = config
        self.kind = kind
        n, r = kind.experts, config.r
        self.lora_A = nn.Parameter(torch.empty(n, r, kind.in_features, device=device, dtype=dtype))
        self.lora_B = nn.Parameter(torch.empty(n, kind.out_features, r, device=device, dtype=dtype))
        self.reset_parameters()

    def forward(self, x: Tensor, y: Tensor, base_layer: nn.Module) -> Tensor:
        """Raise: experts are read, not called."""
        raise TypeError("a stack of experts is read, not called; read the weight of its layer")

    def merged(self, weight: Tensor) -> Tensor:
        """Return ``W + s B A`` of all experts in ``weight``'s dtype."""
        return torch.baddbmm(weight, *self._factors(slice(None), weight.dtype), alpha=self.config.scale)

    def piece_merger(self) -> PieceMerger:
        """Return what does so with some of the experts."""
        return lambda piece, rows: piece.baddbmm_(*self._factors(rows, piece.dtype), alpha=self.config.scale)

    def _factors(self, experts: slice, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """What gives the update as the module stores it: ``B_e A_e``, or ``A_e^T B_e^T``."""
        A, B = self.lora_A[experts].to(dtype), self.lora_B[experts].to(dtype)
        return (A.mT, B.mT) if self.kind.transposed else (B, A)

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Draw one factor of each expert and zero the other."""
        for lora_A, lora_B in zip(self.lora_A, self.lora_B, strict=True):
            INITIALIZERS[self.config.init](lora_A, lora_B)

    def extra_repr(self) -> str:
        """The hyperparameters, for ``print(model)``."""
        return f"r={self.config.r}, alpha={self.config.alpha:g}, experts={self.kind.experts}"
