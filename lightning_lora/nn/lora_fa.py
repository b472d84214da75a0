"""LoRA-FA: ``LoRAFAConfig`` says what to build, ``LoRAFA`` is the adapter."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn

from lightning_lora.nn.adapter import Adapter
from lightning_lora.nn.functional import update_merger, updated
from lightning_lora.nn.kind import Kind
from lightning_lora.nn.kinds import kind_of
from lightning_lora.nn.low_rank import LowRankConfig, draw_factors
from lightning_lora.nn.pieces import PieceMerger


@dataclass(frozen=True, kw_only=True, slots=True)
class LoRAFAConfig(LowRankConfig):
    """LoRA with ``A`` frozen (Zhang et al., arXiv 2308.03303): ``h = W x + s B A D(x)``, and ``B`` alone is trained.

    The weight changes within the row space of a random ``A``. For the gradient of ``B`` only ``A x``, of ``R``
    features, has to be kept until the backward pass, not ``x``.

    Takes the arguments of :class:`~lightning_lora.nn.lora.LoRAConfig`.
    """

    method: ClassVar[str] = "lora_fa"

    def check(self, kind: Kind) -> None:
        """Raise ``ValueError`` for an embedding too: a random ``A`` would move tokens that are never seen."""
        LowRankConfig.check(self, kind)
        if kind.zero_factor == "lora_A":
            raise ValueError(
                f"LoRA-FA freezes a random A, and over an {kind.name} A starts at zero, so that tokens never seen stay "
                "where they are; use lora or dora there"
            )

    def build(self, base_layer: nn.Module, *, device: torch.device, dtype: torch.dtype) -> LoRAFA:
        """Make a fresh :class:`LoRAFA` for ``base_layer``."""
        return LoRAFA(self, kind_of(base_layer), device=device, dtype=dtype)


class LoRAFA(Adapter):
    """One LoRA-FA on one layer: ``y' = y + s B A phi(D(x))``.

    Attributes:
        lora_A: Down projection of shape ``(R, I)``, random. It is never trained, and saved with the adapter.
        lora_B: Up projection of shape ``(O, R)``, zero at the start.
    """

    up = ("lora_B",)

    config: LoRAFAConfig

    def __init__(self, config: LoRAFAConfig, kind: Kind, *, device: torch.device, dtype: torch.dtype) -> None:
        super().__init__()
        self.config = config
        self.kind = kind
        # A parameter rather than a buffer: DistributedDataParallel makes these equal once, and buffers at each forward.
        shape_A, shape_B = (config.r, kind.in_features), (kind.out_features, config.r)
        self.lora_A = nn.Parameter(torch.empty(shape_A, device=device, dtype=dtype), requires_grad=False)
        self.lora_B = nn.Parameter(torch.empty(shape_B, device=device, dtype=dtype))
        self.reset_parameters()

    def forward(self, x: Tensor, y: Tensor, base_layer: nn.Module) -> Tensor:
        """Map input and base output to the adapted output."""
        if self.training and self.config.dropout > 0:
            x = self.kind.drop(x, self.config.dropout)
        return self.kind.add_low_rank(y, x, self.lora_A, self.lora_B, self.config.scale)

    def merged(self, weight: Tensor) -> Tensor:
        """Return ``W + s B A`` in ``weight``'s dtype."""
        matrix = self.kind.to_matrix(weight)
        return self.kind.from_matrix(updated(matrix, self.lora_A, self.lora_B, self.config.scale))

    def piece_merger(self) -> PieceMerger | None:
        """Return what does so with some outputs alone, where the layer stores them first."""
        return update_merger(self.lora_A, self.lora_B, self.config.scale) if self.kind.stores_rows else None

    def update_factors(self) -> tuple[Tensor, Tensor]:
        """Return ``A`` and ``s B``."""
        return self.lora_A, self.config.scale * self.lora_B

    def requires_grad_(self, requires_grad: bool = True) -> LoRAFA:
        """Freeze or unfreeze ``B``; ``A`` stays frozen."""
        self.lora_B.requires_grad_(requires_grad)
        return self

    def reset_parameters(self) -> None:
        """Draw ``A`` and zero ``B``."""
        draw_factors(self.config, self.kind, self.lora_A, self.lora_B)

    def extra_repr(self) -> str:
        """The hyperparameters, for ``print(model)``."""
        return str(self.config)
