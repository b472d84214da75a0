"""A model as quantizing leaves it, in everything but values: what it holds can be counted before there are weights."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from lightning_lora.model.layers import replace, require_adapters
from lightning_lora.nn.adapted import AdaptedLayer
from lightning_lora.nn.experts import StackedWeight
from lightning_lora.nn.lora import LoRA
from lightning_lora.quantization.config import QuantizationConfig
from lightning_lora.quantization.edges import EMBEDDINGS, base_of, edges
from lightning_lora.quantization.pack import blank_layer
from lightning_lora.quantization.quantize import refusals, refuse_none_left, refuse_unfitted


def quantize_blank(
    model: nn.Module, config: QuantizationConfig, device: torch.device, *, embeddings: str | None = None
) -> dict[str, str]:
    """Put layers of the size that quantized ones have under all adapters, in place; no value is read or made.

    Args:
        model: A model with adapters, which may lack their starts.
        config: How the weights would be stored.
        device: Where they would be quantized.
        embeddings: How embeddings and output heads would be stored; None leaves those without an adapter.

    Returns:
        The layers that would stay as they are, with the reason.

    Raises:
        AdapterError: If the model has no adapters.
        QuantizationError: If no layer could be quantized, or one could not whose adapter has ``init="loftq"``, or if
            ``embeddings`` are asked for and there are none, or one shares its weight.
    """
    at_edges, left = ({}, {}) if embeddings is None else edges(model, values=False)
    layers = {name: layer for name, layer in require_adapters(model).items() if name not in at_edges}
    kept = refusals(layers, config, device)
    refuse_none_left(layers, kept, config)
    refuse_unfitted(
        {name: adapter.config for name, layer in layers.items() for adapter in map(layer.adapter, layer.active)}, kept
    )
    for name, layer in layers.items():
        if name not in kept:
            _quantize(layer, config)
    for edge in at_edges.values():
        blank = blank_layer(base_of(edge), EMBEDDINGS[embeddings or "int8"])
        if isinstance(edge, AdaptedLayer):
            edge.base_layer = blank
        else:
            replace(model, {edge: blank})
    return kept | left


def start_blank(model: nn.Module) -> None:
    """Let adapters that wait for a start (in the weight, in data) compute without one, at the sizes they would have."""
    for layer in require_adapters(model).values():
        for adapter in map(layer.adapter, layer.active):
            if isinstance(adapter, LoRA) and not adapter.started:
                _start(adapter, {})


def _quantize(layer: AdaptedLayer, config: QuantizationConfig) -> None:
    base = layer.base_layer
    if not isinstance(base, nn.Linear | StackedWeight):
        return  # quantized already
    layer.base_layer = blank_layer(base, config)
    for name in layer.active:
        adapter = layer.adapter(name)
        if isinstance(adapter, LoRA) and adapter.lora_A0 is not None and layer.base_lacks is None:
            # As where taking the start off brings the base nearer to the weight, which is nearly everywhere.
            factors = {"taken_A": adapter.lora_A, "taken_B": adapter.lora_B}
            _start(adapter, {key: torch.empty_like(t, dtype=torch.int32) for key, t in factors.items()})
            layer.base_lacks = name


def _start(adapter: LoRA, taken: Mapping[str, Tensor]) -> None:
    if adapter.lora_A0 is None:
        adapter.start_with(torch.empty_like(adapter.lora_A))
    else:
        adapter.resume({**adapter.state_dict(), **taken})
