"""What is trained in a comparison: a model from a config, with random weights, a batch, and a loss."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable
from contextlib import contextmanager
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

DTYPE = torch.bfloat16
"""Of weights and activations, everywhere."""

Batch = dict[str, Tensor]


class Workload(ABC):
    """A model, which layers of it are adapted, and what it is trained on."""

    targets: ClassVar[tuple[str, ...]]
    """How the names of the adapted linear layers end."""

    loss_tolerance: ClassVar[float]
    """How far a loss may be from another one, relative to it, because both were rounded."""

    shape: Any
    """What the model follows from: workloads with equal ones may share it."""

    @property
    @abstractmethod
    def tokens(self) -> int:
        """Rows of ``x`` in a linear layer, in one step."""

    @abstractmethod
    def build(self, device: torch.device) -> Any:
        """Make the model on the device, each weight where it stays."""

    @abstractmethod
    def batch(self, device: torch.device) -> Batch:
        """Draw the one batch all steps are made on."""

    @abstractmethod
    def blocks(self, model: nn.Module) -> Iterable[nn.Module]:
        """The repeated blocks, which are compiled one by one."""

    @abstractmethod
    def __str__(self) -> str: ...

    def loss(self, model: nn.Module, batch: Batch) -> Tensor:
        """The model's own loss."""
        loss: Tensor = model(**batch).loss
        return loss

    def chunked_loss(self, model: nn.Module, batch: Batch) -> Tensor:
        """The same without all logits at once, for a model that has many of them."""
        raise NotImplementedError(f"{self} has few classes")


@contextmanager
def made_on(device: torch.device) -> Any:
    """New tensors are half-precision ones on the device."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(DTYPE)
    try:
        with torch.device(device):
            yield
    finally:
        torch.set_default_dtype(before)


def named_targets(model: nn.Module, workload: Workload) -> list[str]:
    """Names of the linear layers that are adapted."""
    return [
        name
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear) and name.rpartition(".")[2] in workload.targets
    ]
