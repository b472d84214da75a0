"""Every combination of a method, a start, a kind of layer and a storage of the base, and which of them there are.

Methods come from the callback's list and starts from the package's: whatever is added there enters the battery.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from dataclasses import dataclass, fields
from typing import Any

import torch
from torch import Tensor, nn

from lightning_lora import LoRAError, inject, quantize
from lightning_lora.callbacks.settings import METHODS
from lightning_lora.nn.adapted import AdaptedLayer
from lightning_lora.nn.adapter import Adapter, AdapterConfig
from lightning_lora.nn.init import INITIALIZERS
from tests.conftest import randomize

STORAGES = {"fp32": torch.float32, "bf16": torch.bfloat16, "nf4": torch.float32}
"""How the base is stored, and what the layer holds before it is."""


def _transposed() -> nn.Module:
    from transformers.pytorch_utils import Conv1D

    return Conv1D(32, 64)


def _numbers(*shape: int) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(3))


KINDS: dict[str, tuple[Callable[[], nn.Module], Tensor]] = {
    "linear": (lambda: nn.Linear(64, 32), _numbers(2, 5, 64)),
    "transposed linear": (_transposed, _numbers(2, 5, 64)),
    "embedding": (lambda: nn.Embedding(24, 16), torch.arange(24).view(4, 6)),
    "conv1d": (lambda: nn.Conv1d(6, 8, 3, dilation=2), _numbers(2, 6, 11)),
    "conv2d": (lambda: nn.Conv2d(6, 8, 3, stride=2, padding=1, groups=2), _numbers(2, 6, 7, 9)),
    "conv3d": (lambda: nn.Conv3d(2, 8, (1, 2, 3), padding=1, padding_mode="replicate"), _numbers(2, 2, 4, 5, 4)),
}


@dataclass(frozen=True)
class Combination:
    """One of them. ``init`` is None where the method has no such field."""

    method: str
    kind: str
    storage: str
    init: str | None = None

    def __str__(self) -> str:
        return "-".join(filter(None, (self.method, self.init, self.kind, self.storage))).replace(" ", "_")

    def config(self, **settings: Any) -> AdapterConfig:
        """A config of rank 4 whose scale is no round number: a forgotten factor would show."""
        has = {field.name for field in fields(METHODS[self.method])}
        wanted = {"r": 4, "alpha": 3.0, "init": self.init} | settings
        return METHODS[self.method](**{name: value for name, value in wanted.items() if name in has})

    def base(self, dtype: torch.dtype | None = None) -> nn.Module:
        """A model of one layer, the same each time."""
        torch.manual_seed(1)
        return nn.Sequential(KINDS[self.kind][0]()).to(dtype or STORAGES[self.storage])

    def fresh(self, dtype: torch.dtype | None = None, **settings: Any) -> nn.Module:
        """That model with an adapter as it starts."""
        model = inject(self.base(dtype), "0", self.config(**settings))
        return quantize(model) if self.storage == "nf4" else model

    def trained(self, dtype: torch.dtype | None = None, **settings: Any) -> nn.Module:
        """That model with an adapter that changes it."""
        torch.manual_seed(2)
        return randomize(self.fresh(dtype, **settings), std=0.3)

    def input(self, dtype: torch.dtype | None = None) -> Tensor:
        """What the model is called with."""
        x = KINDS[self.kind][1]
        return x.to(dtype or STORAGES[self.storage]) if x.is_floating_point() else x


def adapter_of(model: nn.Module, name: str = "default") -> Adapter:
    """The adapter on the one layer."""
    layer = model[0]
    assert isinstance(layer, AdaptedLayer)
    return layer.adapter(name)


def refusal(combination: Combination) -> str | None:
    """What the package says where it refuses to make one, or None."""
    try:
        combination.fresh()
    except LoRAError as error:
        return str(error)
    return None


def every_combination() -> Iterator[Combination]:
    """All of them, refused or not."""
    for method, config in METHODS.items():
        starts = tuple(INITIALIZERS) if "init" in {field.name for field in fields(config)} else (None,)
        for init in starts:
            for kind in KINDS:
                for storage in STORAGES:
                    yield Combination(method, kind, storage, init)


def twin(model: nn.Module) -> nn.Module:
    """A copy without gradients."""
    made = copy.deepcopy(model)
    made.zero_grad()
    return made
