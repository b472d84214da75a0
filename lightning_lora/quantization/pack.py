"""From one dense layer to the packed one in its place, whatever kind of layer it is."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from lightning_lora.errors import QuantizationError
from lightning_lora.model.merge import is_finite
from lightning_lora.nn.base import stored_weight
from lightning_lora.nn.experts import StackedWeight
from lightning_lora.quantization.config import Layout, NF4Config, QuantizationConfig
from lightning_lora.quantization.formats import FrozenLayer, linear_class, quantized_linear
from lightning_lora.quantization.nf4_stack import NF4Stack, rows_and_columns


def pack(base: nn.Module, config: QuantizationConfig) -> FrozenLayer:
    """Quantize a linear layer or a stack of experts; it stays as it is, and its bias is shared."""
    if isinstance(base, StackedWeight):
        assert isinstance(config, NF4Config)
        return NF4Stack.from_stack(base, config)
    assert isinstance(base, nn.Linear)
    return quantized_linear(base, config)


def packed_layer(
    base: nn.Module, config: QuantizationConfig, packed: Mapping[str, Tensor], dtype: torch.dtype
) -> FrozenLayer:
    """Return what :func:`pack` makes of a layer, from tensors that were packed before.

    Args:
        base: A linear layer or a stack of experts, whose weight may be on the meta device: only its shape is looked at.
        config: How the weight is stored.
        packed: The packed tensors by name, on any device.
        dtype: What the weight was.

    Raises:
        QuantizationError: If they are not those of a weight of this shape.
    """
    assert isinstance(base, nn.Linear | StackedWeight)
    shape = rows_and_columns(base) if isinstance(base, StackedWeight) else (base.out_features, base.in_features)
    found = {name: (tuple(tensor.shape), tensor.dtype) for name, tensor in packed.items()}
    expected = config.layout(*shape)
    if found != expected:
        raise QuantizationError(f"{_words(found)}; expected {_words(expected)}")
    if isinstance(base, StackedWeight):
        assert isinstance(config, NF4Config)
        return NF4Stack.of_stack(base, config, packed, dtype)
    bias = None if base.bias is None else nn.Parameter(base.bias.detach(), requires_grad=False)
    return linear_class(config)(shape, config, packed, bias=bias, source_dtype=dtype).train(base.training)


def require_finite(name: str, base: nn.Module) -> None:
    """Raise ``QuantizationError`` if the weight of the layer called ``name`` is not finite."""
    if not is_finite(stored_weight(base).detach()):
        raise QuantizationError(
            f"the base weight of {name} holds NaN or infinity: one such value would spoil its whole block. Mend "
            f"the base model, or pass exclude={name!r}"
        )


def _words(layout: Layout) -> str:
    return ", ".join(f"{name} {tuple(shape)} of {dtype}" for name, (shape, dtype) in layout.items())
