"""What the methods with a low-rank update ``s B A`` share: their settings, and how a fresh update starts."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from numbers import Integral, Real
from typing import ClassVar

import torch
from torch import Tensor

from lightning_lora.nn.adapter import AdapterConfig
from lightning_lora.nn.init import INITIALIZERS, INITS, kaiming, starts_from, zero_down
from lightning_lora.nn.kind import Kind

SCALINGS: dict[str, Callable[[float, int], float]] = {
    "standard": lambda alpha, r: alpha / r,
    "rslora": lambda alpha, r: alpha / math.sqrt(r),
}


@dataclass(frozen=True, kw_only=True, slots=True)
class LowRankConfig(AdapterConfig):
    """The settings of an update ``s B A`` with ``A: (R, I)`` and ``B: (O, R)``, valid as soon as they exist.

    Whoever asks whether a config has a rank, an ``alpha`` and a scaling asks whether it is one of these. The arguments
    are described at :class:`~lightning_lora.nn.lora.LoRAConfig`.

    Raises:
        TypeError: If a number is not one.
        ValueError: If a value is out of range; the message says which are not.
    """

    decisive: ClassVar[tuple[str, ...]] = ("r", "alpha", "scaling")

    starts: ClassVar[tuple[str, ...]] = ("chance",)
    """What a start may be computed from."""

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
        if not isinstance(self.init, str) or starts_from(self.init) is None:
            raise ValueError(f"init must be one of {', '.join(INITS)}, got {self.init!r}")
        if self.starts_from not in self.starts:
            raise ValueError(
                f"init={self.init!r} starts from the {self.starts_from}, which {self.method} cannot; use one of "
                f"{', '.join(INITIALIZERS)}, or method 'lora'"
            )
        if self.init == "orthogonal" and self.r % 2:
            raise ValueError(f"init='orthogonal' needs an even r, got {self.r}; use r={self.r + 1}")
        if self.scaling not in SCALINGS:
            raise ValueError(f"scaling must be one of {', '.join(sorted(SCALINGS))}, got {self.scaling!r}")

    @property
    def scale(self) -> float:
        """The factor ``s`` in front of ``B A``."""
        return SCALINGS[self.scaling](self.alpha, self.r)

    @property
    def starts_from(self) -> str:
        """What the start is computed from."""
        return str(starts_from(self.init))

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

    def __str__(self) -> str:
        return f"r={self.r}, alpha={self.alpha:g}, dropout={self.dropout:g}"


@torch.no_grad()
def draw_factors(config: LowRankConfig, kind: Kind, lora_A: Tensor, lora_B: Tensor) -> None:
    """Start an update over a layer of this kind: one factor is drawn, the other is zero."""
    draw = zero_down if kind.zero_factor == "lora_A" else INITIALIZERS.get(config.init, kaiming)
    draw(lora_A, lora_B)
