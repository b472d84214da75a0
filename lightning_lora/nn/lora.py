"""LoRA: ``LoRAConfig`` says what to build, ``LoRA`` is the adapter."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from numbers import Integral, Real
from typing import ClassVar

import torch
from torch import Tensor, nn

from lightning_lora.nn.adapter import Adapter, AdapterConfig
from lightning_lora.nn.functional import delta
from lightning_lora.nn.init import INITIALIZERS, zero_down
from lightning_lora.nn.kind import Kind
from lightning_lora.nn.kinds import kind_of

SCALINGS: dict[str, Callable[[float, int], float]] = {
    "standard": lambda alpha, r: alpha / r,
    "rslora": lambda alpha, r: alpha / math.sqrt(r),
}


@dataclass(frozen=True, kw_only=True, slots=True)
class LoRAConfig(AdapterConfig):
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

    r: int = 16
    alpha: float = 32.0
    dropout: float = 0.0
    init: str = "kaiming"
    scaling: str = "standard"

    def __post_init__(self) -> None:
        for name, kind, word in (
            ("r", Integral, "an integer"),
            ("alpha", Real, "a number"),
            ("dropout", Real, "a number"),
        ):
            value = getattr(self, name)
            if not isinstance(value, kind) or isinstance(value, bool):
                raise TypeError(f"{name} must be {word}, got {value!r} ({type(value).__name__})")
        # Plain numbers: numpy's would be refused by json, and by torch.load(weights_only=True).
        object.__setattr__(self, "r", int(self.r))
        object.__setattr__(self, "alpha", float(self.alpha))
        object.__setattr__(self, "dropout", float(self.dropout))
        if self.r < 1:
            raise ValueError(f"r must be at least 1, got {self.r}. Typical ranks: 8, 16, 64")
        if not (math.isfinite(self.alpha) and self.alpha > 0):
            raise ValueError(
                f"alpha must be finite and above 0, got {self.alpha}. A common choice is 2 * r = {2 * self.r}"
            )
        if not 0 <= self.dropout < 1:
            raise ValueError(f"dropout must be at least 0 and below 1, got {self.dropout}")
        for name, choices in (("init", INITIALIZERS), ("scaling", SCALINGS)):
            value = getattr(self, name)
            if value not in choices:
                raise ValueError(f"{name} must be one of {', '.join(sorted(choices))}, got {value!r}")

    @property
    def scale(self) -> float:
        """The factor ``s`` in front of ``B A``."""
        return SCALINGS[self.scaling](self.alpha, self.r)

    def check(self, kind: Kind) -> None:
        """Raise ``ValueError`` if the rank is more than such a layer can have, or it cannot drop out."""
        most = min(kind.in_features, kind.out_features)
        if self.r > most:
            raise ValueError(
                f"r={self.r} is more than the full rank {most} of a layer {kind.in_features} -> {kind.out_features}; "
                f"use r <= {most}"
            )
        if self.dropout and kind.name == "embedding":
            raise ValueError("an embedding's input is tokens, which dropout cannot zero; use dropout=0 there")

    def build(self, base_layer: nn.Module, *, device: torch.device, dtype: torch.dtype) -> LoRA:
        """Make a fresh :class:`LoRA` for ``base_layer``."""
        return LoRA(self, kind_of(base_layer), device=device, dtype=dtype)


class LoRA(Adapter):
    """One LoRA on one layer: ``y' = y + s B A phi(D(x))``, on a linear layer ``y + s (D(x) A^T) B^T``.

    Attributes:
        lora_A: Down projection of shape ``(R, I)``, random at the start (over an embedding zero).
        lora_B: Up projection of shape ``(O, R)``, zero at the start (over an embedding random).
    """

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
        # Added in place: a merge of a large layer holds the weight and the update, and no third of their size.
        return self.kind.from_matrix(delta(self.lora_A, self.lora_B, self.config.scale, weight.dtype)).add_(weight)

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Draw one factor and zero the other."""
        start = zero_down if self.kind.zero_factor == "lora_A" else INITIALIZERS[self.config.init]
        start(self.lora_A, self.lora_B)

    def extra_repr(self) -> str:
        """The hyperparameters, for ``print(model)``."""
        return f"r={self.config.r}, alpha={self.config.alpha:g}, dropout={self.config.dropout:g}"
