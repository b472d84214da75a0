"""This library: ``inject``, then ``quantize``, in eager mode and with what else it offers for speed and memory."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor

from lightning_lora import LoRAConfig, inject, merge, quantize, save_adapter
from lightning_lora.model.layers import adapted_layers
from lightning_lora.optim.flat_adamw import FlatPagedAdamW8bit
from peers.contender import LEARNING_RATE, Contender, Factors, Optimizers, Setting, fused
from peers.machine import Machine
from peers.workload import Batch, Workload


class Ours(Contender):
    """Adapters in float32 over bf16 or NF4."""

    name: ClassVar[str] = "ours"
    quantizes_first: ClassVar[bool] = False

    def inject(self, model: Any, workload: Workload, setting: Setting, device: torch.device) -> Any:
        config = LoRAConfig(r=setting.r, alpha=setting.alpha, dropout=setting.dropout)
        return inject(model, list(workload.targets), config)

    def quantize(self, model: Any, workload: Workload, setting: Setting, device: torch.device) -> Any:
        return quantize(model, device=device)

    def factors(self, model: Any) -> Factors:
        adapters: dict[str, Any] = {name: layer.adapter("default") for name, layer in adapted_layers(model).items()}
        return {name: (adapter.lora_A, adapter.lora_B) for name, adapter in adapters.items()}

    def optimizers(self, machine: Machine) -> Optimizers:
        return {"8-bit": lambda parameters: FlatPagedAdamW8bit(parameters, lr=LEARNING_RATE), "fused": fused}

    def save(self, model: Any, folder: Path) -> None:
        save_adapter(model, folder)

    def merge(self, model: Any) -> None:
        merge(model)


class OursChunked(Ours):
    """With the loss over a few tokens at a time, which never holds all logits."""

    name: ClassVar[str] = "ours, chunked loss"

    def loss(self, workload: Workload, model: Any, batch: Batch) -> Tensor:
        return workload.chunked_loss(model, batch)


class OursGraphed(Ours):
    """The forward and the backward pass launched as one CUDA graph."""

    name: ClassVar[str] = "ours, CUDA graph"

    def step(self, forward_backward: Callable[[], None], machine: Machine) -> Callable[[], None]:
        return machine.captured(forward_backward)
