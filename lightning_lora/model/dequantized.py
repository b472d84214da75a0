"""Weights of a quantized model kept dequantized, in as much memory as there is for that."""

from __future__ import annotations

from torch import Tensor, nn

from lightning_lora.errors import QuantizationError
from lightning_lora.nn.base import QuantizedLinear
from lightning_lora.nn.room import Room


def keep_dequantized(model: nn.Module, size: int) -> Room:
    """Let quantized layers keep the weight they multiply with, until together they take ``size`` bytes.

    The first layers that compute get the room. A weight is dequantized at the same speed wherever it is, so that no
    choice of layers would save more. Results are the same to the bit. Checkpoints have no part of it.

    Args:
        model: Quantized, on any device.
        size: Bytes.

    Returns:
        The room: how much of it is left.

    Raises:
        QuantizationError: If no layer is quantized.
    """
    layers = quantized_layers(model)
    if not layers:
        raise QuantizationError(
            "dequantized_cache keeps dequantized weights, and no layer of the model is quantized. Drop it, or pass "
            "quantization='nf4'"
        )
    room = Room(size)
    for layer in layers:
        layer.keep_in(room)
    return room


def forget_dequantized(model: nn.Module) -> None:
    """Give back what :func:`keep_dequantized` made layers keep."""
    for layer in quantized_layers(model):
        layer.keep_in(None)


def kept_bytes(model: nn.Module) -> int:
    """Bytes of all weights that are kept dequantized now."""
    return sum(weight.nbytes for weight in kept_weights(model))


def kept_weights(model: nn.Module) -> list[Tensor]:
    """The weights that are kept dequantized now."""
    return [layer.kept for layer in quantized_layers(model) if layer.kept is not None]


def quantized_layers(model: nn.Module) -> list[QuantizedLinear]:
    """The layers of a model whose weight is stored in few bits."""
    return [layer for layer in model.modules() if isinstance(layer, QuantizedLinear)]
