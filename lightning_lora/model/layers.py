"""Finding adapted layers in a model, and putting a layer in another's place."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TypeVar

from torch import nn

from lightning_lora.errors import AdapterError, listing
from lightning_lora.nn.adapted import AdaptedLayer

Old = TypeVar("Old", bound=nn.Module)


def adapted_layers(model: nn.Module) -> dict[str, AdaptedLayer]:
    """Every adapted layer by its name in ``model``; one that stands in several places, by its first."""
    return {name: module for name, module in model.named_modules() if isinstance(module, AdaptedLayer)}


def adapter_names(model: nn.Module) -> tuple[str, ...]:
    """Names of all adapters in ``model``."""
    return tuple(dict.fromkeys(name for layer in adapted_layers(model).values() for name in layer.adapters))


def require_adapters(model: nn.Module, *names: str) -> dict[str, AdaptedLayer]:
    """Return the adapted layers.

    Raises:
        AdapterError: If there is none, or no adapter of one of the names.
    """
    layers = adapted_layers(model)
    if not layers:
        raise AdapterError(f"{type(model).__name__} has no adapters, or they are merged; call inject(model, ...) first")
    present = adapter_names(model)
    for name in names:
        if name not in present:
            raise AdapterError(f"no adapter {name!r}; this model has: {listing(present, 12)}")
    return layers


def replace(model: nn.Module, replacements: Mapping[Old, nn.Module]) -> None:
    """Put each new module wherever the old one stands, also where one module stands in several places."""
    for path, module in list(model.named_modules(remove_duplicate=False)):
        if module in replacements and path:
            parent, _, child = path.rpartition(".")
            setattr(model.get_submodule(parent), child, replacements[module])
