"""The frozen model without adapters, whose backward pass goes through to the embedding: what no adapter can pass."""

from __future__ import annotations

from typing import Any, ClassVar

import torch

from peers.contender import Contender, Factors, Setting
from peers.machine import Machine
from peers.workload import Workload


class Floor(Contender):
    """Dense in bf16, whatever the others store."""

    name: ClassVar[str] = "frozen floor"

    def build(self, model: Any, workload: Workload, setting: Setting, machine: Machine) -> Any:
        return model.train()

    def inject(self, model: Any, workload: Workload, setting: Setting, device: torch.device) -> Any:
        return model

    def quantize(self, model: Any, workload: Workload, setting: Setting, device: torch.device) -> Any:
        return model

    def factors(self, model: Any) -> Factors:
        return {}
