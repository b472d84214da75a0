"""Another contender under ``torch.compile``, block by block, so that equal blocks may share one graph."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from peers.contender import Contender, Factors, Optimizers, Setting
from peers.machine import Machine
from peers.workload import Batch, Workload


class Compiled(Contender):
    """Whatever ``inner`` builds, compiled."""

    def __init__(self, inner: Contender) -> None:
        self.inner = inner
        self.name = f"{inner.name.removesuffix(' default')} compiled"  # type: ignore[misc]

    def unavailable(self, machine: Machine) -> str | None:
        return self.inner.unavailable(machine) or machine.cannot_compile()

    def build(self, model: Any, workload: Workload, setting: Setting, machine: Machine) -> nn.Module:
        built = self.inner.build(model, workload, setting, machine)
        for block in workload.blocks(self.plain(built)):
            block.compile(backend=machine.backend, dynamic=False)
        return built

    def inject(self, model: Any, workload: Workload, setting: Setting, device: torch.device) -> Any:
        return self.inner.inject(model, workload, setting, device)

    def quantize(self, model: Any, workload: Workload, setting: Setting, device: torch.device) -> Any:
        return self.inner.quantize(model, workload, setting, device)

    def factors(self, model: Any) -> Factors:
        return self.inner.factors(model)

    def plain(self, model: Any) -> Any:
        return self.inner.plain(model)

    def loss(self, workload: Workload, model: Any, batch: Batch) -> Tensor:
        return self.inner.loss(workload, model, batch)

    def step(self, forward_backward: Callable[[], None], machine: Machine) -> Callable[[], None]:
        return self.inner.step(forward_backward, machine)

    def optimizers(self, machine: Machine) -> Optimizers:
        return self.inner.optimizers(machine)

    def save(self, model: Any, folder: Path) -> None:
        self.inner.save(model, folder)

    def merge(self, model: Any) -> None:
        self.inner.merge(model)
