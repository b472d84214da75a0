"""From one dense layer to the packed one in its place, whatever kind of layer it is."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from lightning_lora.errors import QuantizationError
from lightning_lora.model.merge import is_finite
from lightning_lora.nn.base import stored_weight
from lightning_lora.nn.experts import StackedWeight
from lightning_lora.quantization.config import Int8Config, Layout, QuantizationConfig
from lightning_lora.quantization.formats import FrozenLayer, linear_class, quantized_linear
from lightning_lora.quantization.int8_embedding import Int8Embedding
from lightning_lora.quantization.stacks import rows_and_columns, stack_class


def pack(base: nn.Module, config: QuantizationConfig) -> FrozenLayer:
    """Quantize a linear layer, a stack of experts or in 8 bit an embedding; it stays as it is, its bias is shared."""
    if isinstance(base, StackedWeight):
        return stack_class(config).from_stack(base, config)
    if isinstance(base, nn.Embedding):
        assert isinstance(config, Int8Config)
        return Int8Embedding.from_embedding(base, config)
    assert isinstance(base, nn.Linear)
    return quantized_linear(base, config)


def packed_layer(
    base: nn.Module, config: QuantizationConfig, packed: Mapping[str, Tensor], dtype: torch.dtype
) -> FrozenLayer:
    """Return what :func:`pack` makes of a layer, from tensors that were packed before.

    Args:
        base: A layer that :func:`pack` takes, whose weight may be on the meta device: only its shape is looked at.
        config: How the weight is stored.
        packed: The packed tensors by name, on any device.
        dtype: What the weight was.

    Raises:
        QuantizationError: If they are not those of a weight of this shape.
    """
    shape, expected = _shape(base), _layout(base, config)
    found = {name: (tuple(tensor.shape), tensor.dtype) for name, tensor in packed.items()}
    if found != expected:
        raise QuantizationError(
            f"a weight of shape {shape} as {config.storage} is {_words(expected)}; these are {_words(found)}"
        )
    bias = getattr(base, "bias", None)
    frozen = None if bias is None else nn.Parameter(bias.detach(), requires_grad=False)
    made = _layer_class(base, config)(shape, config, packed, bias=frozen, source_dtype=dtype)
    made.take_after(base)
    return made.train(base.training)


def blank_layer(base: nn.Module, config: QuantizationConfig) -> FrozenLayer:
    """Return a layer that takes the place of another one in size, without values: for whoever counts.

    Its tensors are where the layer's weight is, the meta device included; the bias is shared.
    """
    weight = stored_weight(base)
    packed = {name: weight.new_empty(shape, dtype=dtype) for name, (shape, dtype) in _layout(base, config).items()}
    made = packed_layer(base, config, packed, weight.dtype)
    made.bias = getattr(base, "bias", None)
    return made


def require_finite(name: str, base: nn.Module) -> None:
    """Raise ``QuantizationError`` if the weight of the layer called ``name`` is not finite."""
    if not is_finite(stored_weight(base).detach()):
        raise QuantizationError(
            f"the base weight of {name} holds NaN or infinity: one such value would spoil its whole block. Mend "
            f"the base model, or pass exclude={name!r}"
        )


def _layer_class(base: nn.Module, config: QuantizationConfig) -> type[FrozenLayer]:
    if isinstance(base, StackedWeight):
        return stack_class(config)
    if isinstance(base, nn.Embedding):
        if not isinstance(config, Int8Config):
            raise QuantizationError(f"an embedding in {config.name}; embeddings are stored in int8 alone")
        return Int8Embedding
    return linear_class(config)


def _shape(base: nn.Module) -> tuple[int, int]:
    """Rows and columns of the weight as it is packed."""
    if isinstance(base, StackedWeight):
        return rows_and_columns(base)
    rows, columns = stored_weight(base).shape
    return rows, columns


def _layout(base: nn.Module, config: QuantizationConfig) -> Layout:
    return config.layout(*_shape(base))


def _words(layout: Layout) -> str:
    return ", ".join(f"{name} {tuple(shape)} of {dtype}" for name, (shape, dtype) in layout.items())
