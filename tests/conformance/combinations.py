"""Every combination of a method, a start, a kind of layer and a storage of the base, and which of them there are.

Methods come from the callback's list and starts from the package's: whatever is added there enters the battery.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from dataclasses import dataclass, fields, replace
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from lightning_lora import LoRAError, initialize_eva, inject, quantize
from lightning_lora.callbacks.settings import METHODS
from lightning_lora.model.layers import adapted_layers
from lightning_lora.nn.adapted import AdaptedLayer
from lightning_lora.nn.adapter import AdapterConfig
from lightning_lora.nn.attention import PROJECTIONS
from lightning_lora.nn.decompose import DECOMPOSITIONS
from lightning_lora.nn.init import INITIALIZERS
from lightning_lora.quantization.formats import CONFIGS
from tests.conftest import randomize

STORAGES = {"fp32": torch.float32, "bf16": torch.bfloat16, "nf4": torch.float32}
"""How the base is stored, and what the layer holds before it is."""

SAMPLED = ("fp4", "nf3", "nf2", "int8")
"""Further storages, of which the battery takes some combinations."""

INITS = (*INITIALIZERS, *DECOMPOSITIONS, "pissa_niter_4", "loftq", "eva")


class SelfAttention(nn.Module):
    """torch's attention, called with one argument."""

    def __init__(self) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(32, 4, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        return self.attention(x, x, x, need_weights=False)[0]


class Experts(nn.Module):
    """``sum_e g_e(x) W_e x`` with a softmax over all experts, and their weights in one parameter."""

    is_transposed: ClassVar[bool] = False

    def __init__(self) -> None:
        super().__init__()
        self.gate = nn.Parameter(torch.randn(3, 16))
        self.up = nn.Parameter(torch.randn(3, 12, 16))

    def forward(self, x: Tensor) -> Tensor:
        up = self.up.transpose(1, 2) if self.is_transposed else self.up
        return torch.einsum("...e,eoi,...i->...o", (x @ self.gate.T).softmax(-1), up, x)


class TransposedExperts(Experts):
    """The same, stored as ``W_e^T``, as in GPT-OSS."""

    is_transposed = True

    def __init__(self) -> None:
        super().__init__()
        self.up = nn.Parameter(torch.randn(3, 16, 12))


def _transposed() -> nn.Module:
    from transformers.pytorch_utils import Conv1D

    return Conv1D(32, 64)


def _numbers(*shape: int) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(3))


@dataclass(frozen=True)
class Sample:
    """A layer to adapt.

    Attributes:
        build: Makes a module with it.
        x: What the module is called with.
        paths: What is adapted of a model whose only child is the module.
    """

    build: Callable[[], nn.Module]
    x: Tensor
    paths: tuple[str, ...] = ("0",)

    def parameters(self, weights: dict[str, Tensor]) -> dict[str, Tensor]:
        """The plain model's parameters, from the weight of each adapted layer."""
        return {f"{path}.weight": weight for path, weight in weights.items()}


class AttentionSample(Sample):
    """All four projections at once; each alone is tested with the module itself."""

    def parameters(self, weights: dict[str, Tensor]) -> dict[str, Tensor]:
        """Three of them are one parameter."""
        q, k, v, out = (weights[path] for path in self.paths)
        return {"0.attention.in_proj_weight": torch.cat([q, k, v]), "0.attention.out_proj.weight": out}


class ExpertsSample(Sample):
    """A parameter that is a layer to planning."""

    def parameters(self, weights: dict[str, Tensor]) -> dict[str, Tensor]:
        """Called as the layer is."""
        return weights


KINDS: dict[str, Sample] = {
    "linear": Sample(lambda: nn.Linear(64, 32), _numbers(2, 5, 64)),
    "transposed linear": Sample(_transposed, _numbers(2, 5, 64)),
    "embedding": Sample(lambda: nn.Embedding(24, 16), torch.arange(24).view(4, 6)),
    "conv1d": Sample(lambda: nn.Conv1d(6, 8, 3, dilation=2), _numbers(2, 6, 11)),
    "conv2d": Sample(lambda: nn.Conv2d(6, 8, 3, stride=2, padding=1, groups=2), _numbers(2, 6, 7, 9)),
    "conv3d": Sample(lambda: nn.Conv3d(2, 8, (1, 2, 3), padding=1, padding_mode="replicate"), _numbers(2, 2, 4, 5, 4)),
    "attention": AttentionSample(
        SelfAttention, _numbers(2, 5, 32), tuple(f"0.attention.{name}" for name in PROJECTIONS)
    ),
    "experts": ExpertsSample(Experts, _numbers(2, 5, 16), ("0.up",)),
    "transposed experts": ExpertsSample(TransposedExperts, _numbers(2, 5, 16), ("0.up",)),
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

    @property
    def quantized(self) -> bool:
        """Whether the base is stored in few bits."""
        return self.storage in CONFIGS

    @property
    def dtype(self) -> torch.dtype:
        """What the layer holds before it is quantized."""
        return STORAGES.get(self.storage, torch.float32)

    def stored(self, model: nn.Module) -> nn.Module:
        """Store the base of an adapted model as it is to be."""
        return quantize(model, CONFIGS[self.storage]()) if self.quantized else model

    def config(self, **settings: Any) -> AdapterConfig:
        """A config of rank 4 whose scale is no round number: a forgotten factor would show."""
        has = {field.name for field in fields(METHODS[self.method])}
        wanted = {"r": 4, "alpha": 3.0, "init": self.init} | settings
        return METHODS[self.method](**{name: value for name, value in wanted.items() if name in has})

    def base(self, dtype: torch.dtype | None = None) -> nn.Module:
        """A model of one layer, the same each time."""
        torch.manual_seed(1)
        return nn.Sequential(KINDS[self.kind].build()).to(dtype or self.dtype)

    def add(self, model: nn.Module, name: str = "default", **settings: Any) -> nn.Module:
        """Put an adapter in as it starts, also where that takes data."""
        inject(model, KINDS[self.kind].paths, self.config(**settings), name=name)
        if settings.get("init", self.init) == "eva":
            dtype = next(model.parameters()).dtype
            initialize_eva(model, [self.input(dtype)], name=name, rho=1.0)
        return model

    def fresh(self, dtype: torch.dtype | None = None, **settings: Any) -> nn.Module:
        """The base with an adapter as it starts."""
        model = self.add(self.base(dtype), **settings)
        return self.stored(model)

    def trained(self, dtype: torch.dtype | None = None, **settings: Any) -> nn.Module:
        """The base with an adapter that changes it."""
        model = self.fresh(dtype, **settings)
        torch.manual_seed(2)
        return randomize(model, std=0.3)

    def input(self, dtype: torch.dtype | None = None) -> Tensor:
        """What the model is called with."""
        x = KINDS[self.kind].x
        return x.to(dtype or self.dtype) if x.is_floating_point() else x

    def beside(self, init: str) -> Combination:
        """The same with another start."""
        return replace(self, init=init)


def first_of(model: nn.Module) -> AdaptedLayer:
    """The adapted layer, or the first of several."""
    return next(iter(adapted_layers(model).values()))


def refusal(combination: Combination) -> str | None:
    """What the package says where it refuses to make one, or to compute with it; or None."""
    try:
        combination.fresh()(combination.input())
    except (LoRAError, ValueError) as error:
        return str(error)
    return None


def every_combination() -> Iterator[Combination]:
    """All of them, refused or not."""
    for method, config in METHODS.items():
        starts = INITS if "init" in {field.name for field in fields(config)} else (None,)
        for init in starts:
            for kind in KINDS:
                for storage in STORAGES:
                    yield Combination(method, kind, storage, init)


def twin(model: nn.Module) -> nn.Module:
    """A copy without gradients."""
    made = copy.deepcopy(model)
    made.zero_grad()
    return made
