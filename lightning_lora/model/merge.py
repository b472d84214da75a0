"""Folding adapters into plain layers."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from lightning_lora.errors import MergeError, listing
from lightning_lora.model.biases import unmark_biases
from lightning_lora.model.layers import adapter_names, replace, require_adapters
from lightning_lora.model.parameters import unmark_trained
from lightning_lora.model.split import Host, hosts
from lightning_lora.nn.adapted import AdaptedLayer
from lightning_lora.nn.base import dense_weight, share_hooks, weight_dtype, weight_shape, with_weight
from lightning_lora.nn.pieces import joined
from lightning_lora.nn.split import Split


@torch.no_grad()
def merge(model: nn.Module, *, dtype: torch.dtype | None = None) -> nn.Module:
    """Replace every adapted layer by the plain layer that computes the same, in place, and return the model.

    ``W' = W + s B A`` of the active adapters is summed in ``float32`` and rounded once. Over a quantized base ``W`` is
    the dequantized weight, the one that was trained on, and the result stays unquantized: quantizing again would round
    most of a small update away. Layers are merged one at a time, so the extra memory is that of one layer. The merged
    parameters stay frozen; call ``model.requires_grad_(True)`` to train them.

    Args:
        model: A model with adapters.
        dtype: What to store the merged weights in; None keeps the model's own: a dense layer's dtype, or what a
            quantized layer's weight would have.

    Raises:
        MergeError: If a weight is not finite before or after; nothing is changed then.
        AdapterError: If the model has no adapters.
    """
    check_mergeable(require_adapters(model), dtype=dtype)
    names = adapter_names(model)
    waiting = list(hosts(model).values())[::-1]
    while waiting:  # popped, so that each can be freed before the next is merged
        host = waiting.pop()
        replace(model, {host: merged(host, dtype=dtype)})
    unmark_trained(model, *names)
    unmark_biases(model, *names)
    return model


@torch.no_grad()
def merged(layer: Host, *, dtype: torch.dtype | None = None) -> nn.Module:
    """Return the plain layer that computes what ``layer`` computes; ``layer`` itself is left as it is."""
    plain = _merged_parts(layer, dtype) if isinstance(layer, Split) else _merged_layer(layer, dtype)
    share_hooks(layer, plain)
    return plain


def _merged_parts(split: Split, dtype: torch.dtype | None) -> nn.Module:
    layers = split.parts()
    layers |= {name: _merged_layer(x, dtype) for name, x in layers.items() if isinstance(x, AdaptedLayer)}
    plain, held = split.joined(layers, dtype=dtype), set(split.parameters())
    for module in plain.modules():  # what both held would follow the one that is moved, as the adapted one may be
        for name, parameter in list(module.named_parameters(recurse=False)):
            if parameter in held:
                module.register_parameter(name, nn.Parameter(parameter.detach(), parameter.requires_grad))
    return plain


def _merged_layer(layer: AdaptedLayer, dtype: torch.dtype | None) -> nn.Module:
    base = layer.base_layer
    pieces = layer.merged_pieces(dtype or weight_dtype(base))
    return with_weight(base, joined(pieces, weight_shape(base)[0]))


@torch.no_grad()
def check_mergeable(layers: Mapping[str, AdaptedLayer], *, dtype: torch.dtype | None = None) -> None:
    """Raise ``MergeError`` naming the layers whose base, or merged weight in ``dtype``, is not finite."""
    broken = []
    for name, layer in layers.items():
        if not is_finite(dense_weight(layer.base_layer, weight_dtype(layer.base_layer))):
            broken.append(f"{name} (its base weight)")
        elif not all(map(is_finite, layer.merged_pieces(dtype or weight_dtype(layer.base_layer)))):
            broken.append(f"{name} (its merged weight)")
    if broken:
        raise MergeError(
            f"NaN or infinity in {listing(broken)}; nothing was merged. A NaN comes from a diverged training: go back "
            "to an earlier checkpoint. An infinity comes from a dtype too narrow: merge(model, dtype=torch.float32)"
        )


def is_finite(weight: Tensor) -> bool:
    """Whether every element is finite, without allocating a mask of the weight's size."""
    return weight.numel() == 0 or bool(torch.stack(torch.aminmax(weight)).isfinite().all())
