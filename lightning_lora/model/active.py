"""Which adapters compute."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager

from torch import nn

from lightning_lora.errors import AdapterError, listing
from lightning_lora.model.biases import hand_over_note, unmark_biases
from lightning_lora.model.layers import replace, require_adapters
from lightning_lora.model.parameters import unmark_trained
from lightning_lora.model.routing import computing
from lightning_lora.model.split import join_bare
from lightning_lora.nn.adapted import AdaptedLayer
from lightning_lora.nn.base import share_hooks
from lightning_lora.nn.rows import BASE


def activate(model: nn.Module, *names: str, train: str | Iterable[str] | None = None) -> nn.Module:
    """Let the named adapters compute, their updates added up, and no others; returns the model.

    Args:
        model: A model with adapters.
        names: Those that compute; none of them is the plain base.
        train: Which of these are trainable; None is all. ``activate(model, "old", "new", train="new")`` trains one on
            top of another, ``activate(model, "chat", train=())`` uses one.

    Raises:
        AdapterError: If the model has no adapter of one of the names, or if two of them cannot compute together;
            nothing changes then.
        ValueError: If ``train`` names one that would not compute, and so get no gradient.
    """
    trained = names if train is None else (train,) if isinstance(train, str) else tuple(train)
    idle = [name for name in trained if name not in names]
    if idle:
        raise ValueError(
            f"train names {listing(idle)}, which activate is not asked to let compute; add it to the names"
        )
    layers = require_adapters(model, *names)
    for path, layer in layers.items():
        _check_together(path, layer, [name for name in names if name in layer.adapters])
    for layer in layers.values():
        layer.active = tuple(dict.fromkeys(name for name in names if name in layer.adapters))
        for name, adapter in layer.adapters.items():
            adapter.requires_grad_(name in trained)
    return model


@contextmanager
def disabled(model: nn.Module) -> Iterator[nn.Module]:
    """Within the context the model computes its frozen base: a reference model without a second copy in memory.

    What is activated, injected or loaded meanwhile computes from the end of the context on.

    Raises:
        AdapterError: If the model has no adapters.
    """
    with computing(model, BASE):
        yield model


def delete_adapter(model: nn.Module, name: str) -> nn.Module:
    """Remove an adapter, in place, and return the model; layers left without any become plain again.

    Raises:
        AdapterError: If there is no such adapter, if rows are routed to it, or if the base was quantized without its
            start: what is left would be another model.
    """
    layers = require_adapters(model, name)
    if any(layer.rows is not None and name in layer.rows.adapters for layer in layers.values()):
        raise AdapterError(f"rows are routed to adapter {name!r} now; delete it outside of routed()")
    needed = [path for path, layer in layers.items() if layer.base_lacks == name]
    if needed:
        raise AdapterError(
            f"the base of {listing(needed)} was quantized without what adapter {name!r} starts with, so it is needed "
            "there. Use activate(model, ...) or disabled(model) to compute without it"
        )
    for layer in layers.values():
        if name in layer.adapters:
            del layer.adapters[name]
            layer.active = tuple(active for active in layer.active if active != name)
    bare = {layer: layer.base_layer for layer in layers.values() if not layer.adapters}
    for layer, base in bare.items():
        share_hooks(layer, base)
        hand_over_note(layer, base)
    replace(model, bare)
    join_bare(model)
    unmark_trained(model, name)
    unmark_biases(model, name)
    return model


def _check_together(path: str, layer: AdaptedLayer, names: list[str]) -> None:
    alone = [name for name in names if not layer.adapter(name).additive]
    if alone and len(names) > 1:
        method = layer.adapter(alone[0]).config.method
        raise AdapterError(
            f"{listing(names)} cannot be active together on {path}: {alone[0]!r} is {method}, which rescales the whole "
            "weight, so what they compute would depend on their order. Activate one of them, or merge one first"
        )
