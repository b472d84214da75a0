"""The same linear layers with the same adapter, once by this library and once by PEFT.

Both get equal base weights and equal, nonzero ``A`` and ``B``, so that they compute the same function and may be
compared on what it costs them.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import bitsandbytes
import peft
import torch
from torch import Tensor, nn

from lightning_lora import DoRAConfig, LoRAConfig, inject, quantize

ALPHA_OVER_R = 2.0
DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32, "nf4": torch.bfloat16}
"""What each kind of base computes in; ``x`` has this dtype too."""


@dataclass(frozen=True)
class Case:
    """What is adapted and how.

    Attributes:
        base: ``"bf16"``, ``"fp32"`` or ``"nf4"`` (double-quantized, computing in bf16).
        dropout: On the adapter's input.
        width: Input and output features of each layer.
        tokens: Rows of ``x``.
        r: Rank.
    """

    base: str
    dropout: float = 0.0
    width: int = 2048
    tokens: int = 512
    r: int = 16

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of ``x`` and of the products with the base weight."""
        return DTYPES[self.base]

    def __str__(self) -> str:
        dropped = f", dropout {self.dropout:g}" if self.dropout else ""
        return f"{self.base}{dropped}, {self.tokens} tokens"


@dataclass(frozen=True)
class Weights:
    """One layer's weights: ``W`` as stored before quantization, and the adapter's master weights in ``float32``."""

    W: Tensor
    A: Tensor
    B: Tensor


@dataclass(frozen=True)
class Adapted:
    """One adapted layer of either library, with its trainable factors."""

    layer: nn.Module
    A: nn.Parameter
    B: nn.Parameter


def draw(case: Case, names: tuple[str, ...]) -> dict[str, Weights]:
    """Draw weights such that the base and the adapter contribute about equally to the output."""
    width, r = case.width, case.r
    return {
        name: Weights(
            W=(torch.randn(width, width) / math.sqrt(width)).to(case.dtype),
            A=torch.randn(r, width) / math.sqrt(width),
            B=torch.randn(width, r) / (ALPHA_OVER_R * math.sqrt(r)),
        )
        for name in names
    }


def ours(
    case: Case, weights: Mapping[str, Weights], method: type[LoRAConfig | DoRAConfig] = LoRAConfig
) -> dict[str, Adapted]:
    """Adapt with this library: ``inject``, and ``quantize`` where the base is NF4."""
    model = nn.ModuleDict({name: _linear(its.W) for name, its in weights.items()})
    config = method(r=case.r, alpha=ALPHA_OVER_R * case.r, dropout=case.dropout)
    inject(model, list(weights), config)
    if case.base == "nf4":
        quantize(model)
    layers = {name: model.get_submodule(name) for name in weights}
    factors = {name: model.get_submodule(f"{name}.adapters.default") for name in weights}
    return _filled({n: Adapted(layers[n], factors[n].lora_A, factors[n].lora_B) for n in weights}, weights)


def theirs(
    case: Case, weights: Mapping[str, Weights], *, autocast_adapter_dtype: bool = True, use_dora: bool = False
) -> dict[str, Adapted]:
    """Adapt with PEFT: adapters in ``float32`` by default, in the base's dtype without ``autocast_adapter_dtype``."""
    make = _linear4bit if case.base == "nf4" else _linear
    model: Any = nn.ModuleDict({name: make(its.W) for name, its in weights.items()})
    model.is_loaded_in_4bit = case.base == "nf4"  # what PEFT looks for before it adapts a Linear4bit
    config = peft.LoraConfig(
        r=case.r,
        lora_alpha=ALPHA_OVER_R * case.r,
        lora_dropout=case.dropout,
        target_modules=list(weights),
        use_dora=use_dora,
    )
    adapted: Any = peft.get_peft_model(model, config, autocast_adapter_dtype=autocast_adapter_dtype)
    layers = {name: adapted.base_model.model[name] for name in weights}
    made = {n: Adapted(x, x.lora_A["default"].weight, x.lora_B["default"].weight) for n, x in layers.items()}
    return _filled(made, weights)


def _linear(weight: Tensor) -> nn.Linear:
    layer = nn.Linear(weight.shape[1], weight.shape[0], bias=False, device="meta")
    layer.weight = nn.Parameter(weight.clone(), requires_grad=False)
    return layer


def _linear4bit(weight: Tensor) -> nn.Module:
    layer: Any = bitsandbytes.nn.Linear4bit(
        weight.shape[1], weight.shape[0], bias=False, compute_dtype=weight.dtype, quant_type="nf4", device="meta"
    )
    layer.weight = bitsandbytes.nn.Params4bit(weight.clone(), requires_grad=False, quant_type="nf4", module=layer)
    layer.support_avx512bf16_for_cpu = False  # otherwise an evaluation repacks the weight and training stops working
    return layer.to("cpu")


def _filled(adapted: dict[str, Adapted], weights: Mapping[str, Weights]) -> dict[str, Adapted]:
    with torch.no_grad():
        for name, its in adapted.items():
            its.A.copy_(weights[name].A)
            its.B.copy_(weights[name].B)
            its.layer.train()
    return adapted
