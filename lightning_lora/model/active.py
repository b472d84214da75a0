"""Which adapters compute."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from torch import nn

from lightning_lora.model.layers import replace, require_adapters
from lightning_lora.model.parameters import unmark_trained
from lightning_lora.model.split import join_bare
from lightning_lora.nn.base import share_hooks


def activate(model: nn.Module, *names: str) -> nn.Module:
    """Let the named adapters compute and be trained, in that order, and no others; returns the model.

    Raises:
        AdapterError: If the model has no adapter of one of the names; nothing changes then.
    """
    for layer in require_adapters(model, *names).values():
        layer.active = tuple(name for name in names if name in layer.adapters)
        for name, adapter in layer.adapters.items():
            adapter.requires_grad_(name in layer.active)
    return model


@contextmanager
def disabled(model: nn.Module) -> Iterator[nn.Module]:
    """Within the context the model computes its frozen base: a reference model without a second copy in memory."""
    layers = require_adapters(model)
    before = {layer: layer.active for layer in layers.values()}
    try:
        for layer in before:
            layer.active = ()
        yield model
    finally:
        for layer, active in before.items():
            layer.active = tuple(name for name in active if name in layer.adapters)


def delete_adapter(model: nn.Module, name: str) -> nn.Module:
    """Remove an adapter, in place, and return the model; layers left without any become plain again.

    Raises:
        AdapterError: If there is no such adapter.
    """
    layers = require_adapters(model, name)
    for layer in layers.values():
        if name in layer.adapters:
            del layer.adapters[name]
            layer.active = tuple(active for active in layer.active if active != name)
    bare = {layer: layer.base_layer for layer in layers.values() if not layer.adapters}
    for layer, base in bare.items():
        share_hooks(layer, base)
    replace(model, bare)
    join_bare(model)
    unmark_trained(model, name)
    return model
