"""The contract of a contender: one way of adapting a model, which all are asked for in the same words."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from peers.machine import Machine
from peers.workload import Batch, Workload


@dataclass(frozen=True)
class Setting:
    """What every contender is asked for.

    Attributes:
        base: ``"bf16"``, or ``"nf4"`` with double quantization.
        dropout: On the adapter's input.
        checkpointing: Whether each block's activations are computed again in the backward pass.
        r: Rank; ``alpha`` is twice that.
    """

    base: str
    dropout: float = 0.0
    checkpointing: bool = False
    r: int = 16

    @property
    def alpha(self) -> int:
        return 2 * self.r

    def __str__(self) -> str:
        dropped = f", dropout {self.dropout:g}" if self.dropout else ""
        return f"{self.base}{dropped}{', checkpointing' if self.checkpointing else ''}"


Factors = dict[str, tuple[nn.Parameter, nn.Parameter]]
"""``A`` and ``B`` by the name of the layer in the model as it was built."""

Optimizers = dict[str, Callable[[Iterable[nn.Parameter]], torch.optim.Optimizer]]


class Contender(ABC):
    """One way of adapting a model."""

    name: ClassVar[str]
    quantizes_first: ClassVar[bool] = True
    """Whether it adapts what was quantized before, or quantizes under its adapters."""

    unlike: ClassVar[dict[str, str]] = {}
    """By base: why its frozen weights are other numbers than the reference's, if they are."""

    def unavailable(self, machine: Machine) -> str | None:
        """Return why it cannot run here, or None."""
        return None

    def build(self, model: Any, workload: Workload, setting: Setting, machine: Machine) -> nn.Module:
        """Return the adapted model, ready to train; ``model`` is its own, its parameters may be shared."""
        steps = (self.quantize, self.inject) if self.quantizes_first else (self.inject, self.quantize)
        for step in steps:
            if setting.base == "nf4" or step == self.inject:
                model = step(model, workload, setting, machine.device)
        return model.train()

    @abstractmethod
    def inject(self, model: Any, workload: Workload, setting: Setting, device: torch.device) -> Any:
        """Adapt the linear layers."""

    @abstractmethod
    def quantize(self, model: Any, workload: Workload, setting: Setting, device: torch.device) -> Any:
        """Bring the linear layers to NF4 and to the device."""

    @abstractmethod
    def factors(self, model: Any) -> Factors:
        """Return the adapters' parameters; empty for a model that has none."""

    def plain(self, model: Any) -> Any:
        """Return the model inside, as it was built."""
        return model

    def loss(self, workload: Workload, model: Any, batch: Batch) -> Tensor:
        """Return the loss of a batch."""
        return workload.loss(model, batch)

    def step(self, forward_backward: Callable[[], None], machine: Machine) -> Callable[[], None]:
        """Return what is called in each step in place of ``forward_backward``."""
        return forward_backward

    def optimizers(self, machine: Machine) -> Optimizers:
        """What its users step with, by kind: ``"8-bit"`` and torch's ``"fused"``."""
        return {"8-bit": paged_8bit, "fused": fused}

    def save(self, model: Any, folder: Path) -> None:
        """Write the adapter."""
        raise NotImplementedError

    def merge(self, model: Any) -> None:
        """Fold the adapter in."""
        raise NotImplementedError


def paged_8bit(parameters: Iterable[nn.Parameter]) -> torch.optim.Optimizer:
    """bitsandbytes' paged AdamW, tensor by tensor, without its warning that a CPU pages nothing."""
    import bitsandbytes

    optimizer: torch.optim.Optimizer = bitsandbytes.optim.PagedAdamW8bit(parameters, lr=LEARNING_RATE)
    optimizer._cpu_paged_warned = True  # type: ignore[attr-defined]
    return optimizer


def fused(parameters: Iterable[nn.Parameter]) -> torch.optim.Optimizer:
    """torch's AdamW, with moments in 32 bits (16 for adapters in half precision)."""
    return torch.optim.AdamW(parameters, lr=LEARNING_RATE, fused=True)


LEARNING_RATE = 1e-9
"""So that timed steps lead nowhere."""
