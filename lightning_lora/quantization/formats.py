"""The storages there are, by the name users write, with the layer that implements each."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from lightning_lora.quantization.config import (
    FP4Config,
    Int8Config,
    NF2Config,
    NF3Config,
    NF4Config,
    QuantizationConfig,
)
from lightning_lora.quantization.fp4 import FP4Linear
from lightning_lora.quantization.frozen_linear import FrozenLinear
from lightning_lora.quantization.int8 import Int8Linear
from lightning_lora.quantization.nf4 import NF4Linear
from lightning_lora.quantization.normal_float import NormalFloatLinear

FrozenLayer = FrozenLinear[Any]
"""A layer in any of them."""

AnyConfig = NF4Config | FP4Config | NF3Config | NF2Config | Int8Config
"""Every config, for annotations that a parser reads."""

_LAYERS: dict[type[QuantizationConfig], type[FrozenLayer]] = {
    NF4Config: NF4Linear,
    FP4Config: FP4Linear,
    NF3Config: NormalFloatLinear,
    NF2Config: NormalFloatLinear,
    Int8Config: Int8Linear,
}
CONFIGS: dict[str, type[QuantizationConfig]] = {config.name: config for config in _LAYERS}


def linear_class(config: QuantizationConfig) -> type[FrozenLayer]:
    """The layer that stores its weight as a config says."""
    return _LAYERS[type(config)]


def quantized_linear(layer: nn.Linear, config: QuantizationConfig, *, weight: Tensor | None = None) -> FrozenLayer:
    """Quantize a layer's weight, or another one in its place; the layer stays as it is and its bias is shared."""
    return linear_class(config).from_linear(layer, config, weight=weight)


def blank_linear(layer: nn.Linear, config: QuantizationConfig) -> FrozenLayer:
    """Return a layer that takes the place of another one in size, without values: for whoever counts or loads.

    Its tensors are where the layer's weight is, the meta device included; the bias is shared.
    """
    layout = config.layout(layer.out_features, layer.in_features)
    packed = {
        name: torch.empty(shape, dtype=dtype, device=layer.weight.device) for name, (shape, dtype) in layout.items()
    }
    shape, dtype = (layer.out_features, layer.in_features), layer.weight.dtype
    return linear_class(config)(shape, config, packed, bias=layer.bias, source_dtype=dtype).train(layer.training)


def config_of(value: str | QuantizationConfig) -> QuantizationConfig:
    """A storage by its name, or as its config.

    Raises:
        ValueError: If it is neither.
    """
    if not isinstance(value, str) and type(value) in CONFIGS.values():
        return value
    if value not in CONFIGS:
        raise ValueError(f"quantization must be one of {', '.join(CONFIGS)}, their configs or None, got {value!r}")
    return CONFIGS[str(value)]()


def from_storage(words: str) -> QuantizationConfig:
    """The config that a layer's ``storage`` describes: ``nf4/64 double-quantized``.

    Raises:
        ValueError: If it describes none.
    """
    name = words.partition("/")[0]
    if name not in CONFIGS:
        raise ValueError(f"{words!r} is no storage of a base; they begin with {', '.join(CONFIGS)}")
    return CONFIGS[name].from_storage(words)
