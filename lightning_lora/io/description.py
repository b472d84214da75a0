"""What an adapter is, as plain data that a checkpoint or a file header can hold, and how two of them differ."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import nn

from lightning_lora.io.keys import canonical
from lightning_lora.model.biases import trained_biases
from lightning_lora.model.layers import require_adapters
from lightning_lora.model.parameters import trained_modules
from lightning_lora.nn.adapter import AdapterConfig
from lightning_lora.nn.attention import SplitAttention
from lightning_lora.nn.base import QuantizedLinear
from lightning_lora.nn.kind import Kind
from lightning_lora.nn.linear import LinearKind
from lightning_lora.nn.low_rank import LowRankConfig

VERSION = 1

KEY = "lightning_lora"
"""The entry of a checkpoint, and of a file's header, that holds a description."""

ATTENTION = "projection of an attention"
"""The kind of a linear layer that ``nn.MultiheadAttention`` packs with others."""

CHANCE = "chance"
"""The start of adapters that were drawn, from whatever distribution."""

Description = dict[str, Any]


def describe(model: nn.Module, name: str = "default") -> Description:
    """Describe adapter ``name`` of ``model``.

    Returns:
        ``version``, ``method``, the method's decisive fields such as ``r``, ``alpha`` and ``scaling``, ``start``,
        ``kinds`` of layers (each one value, or a mapping from layer to value where layers differ), ``targets`` (adapted
        layers), ``train`` (modules trained whole), ``biases`` (layers whose bias is trained), ``quantization`` (how
        the base under the adapters is stored) and ``embeddings`` (the embeddings and output heads that are stored
        in few bits for their own sake, with an adapter or without, and how).
    """
    found = {path: layer for path, layer in require_adapters(model, name).items() if name in layer.adapters}
    layers = {canonical(path): layer for path, layer in found.items()}
    configs = {path: layer.adapter(name).config for path, layer in layers.items()}
    stored = {path: storage(layer.base_layer) for path, layer in layers.items()}
    return {
        "version": VERSION,
        **describe_configs(configs),
        **describe_starts(configs),
        "kinds": _collapse({canonical(path): _kind(model, path, layer.kind) for path, layer in found.items()}),
        "train": sorted(map(canonical, trained_modules(model, name))),
        "biases": sorted(map(canonical, trained_biases(model, name))),
        "quantization": _collapse(stored),
        "embeddings": stored_edges(model),
    }


def stored_edges(model: nn.Module) -> dict[str, str]:
    """How each embedding and output head is stored that is in few bits for its own sake, by its name in the base."""
    found = {path: module for path, module in model.named_modules() if isinstance(module, QuantizedLinear)}
    return {canonical(path).removesuffix(".base_layer"): edge.storage for path, edge in found.items() if edge.edge}


def describe_configs(configs: Mapping[str, AdapterConfig]) -> Description:
    """The part of a description that decides what tensors mean: ``method``, its decisive fields, and ``targets``."""
    names = dict.fromkeys(name for config in configs.values() for name in config.decisive)
    fields = {
        name: {path: getattr(config, name) for path, config in configs.items() if name in config.decisive}
        for name in names
    }
    return {
        "method": _collapse({path: config.method for path, config in configs.items()}),
        **{name: _collapse(values) for name, values in fields.items()},
        "targets": sorted(configs),
    }


def describe_starts(configs: Mapping[str, AdapterConfig]) -> Description:
    """``start``: the init of adapters whose start is computed from something, else ``"chance"``."""
    starts = {
        path: config.init if isinstance(config, LowRankConfig) and config.starts_from != CHANCE else CHANCE
        for path, config in configs.items()
    }
    return {"start": _collapse(starts)} if starts else {}


def storage(base: nn.Module) -> str:
    """How a base layer is stored, as a description has it."""
    return base.storage if isinstance(base, QuantizedLinear) else "none"


def storage_in(description: Mapping[str, Any] | None, path: str) -> str | None:
    """How a description says that a layer was stored, or None where it does not say."""
    stored = (description or {}).get("quantization")
    stored = stored.get(path) if isinstance(stored, dict) else stored
    return stored if isinstance(stored, str) else None


def differences(saved: Mapping[str, Any], here: Mapping[str, Any]) -> list[str]:
    """Say in words where two descriptions differ, for the keys both have: ``r is 8 in the file and 16 here``."""
    found = []
    for key in here:
        if key in saved and saved[key] != here[key]:
            theirs, ours = saved[key], here[key]
            if _are_names(theirs) and _are_names(ours):
                only_there, only_here = sorted(set(theirs) - set(ours)), sorted(set(ours) - set(theirs))
                found.append(f"{key}: {_some(only_there)} only there, {_some(only_here)} only here")
            else:
                found.append(f"{key} is {_brief(theirs)} there and {_brief(ours)} here")
    return found


def _are_names(value: Any) -> bool:
    return isinstance(value, list) and all(isinstance(name, str) for name in value)


def _kind(model: nn.Module, path: str, kind: Kind) -> str:
    if isinstance(model.get_submodule(path.rpartition(".")[0]), SplitAttention):
        return ATTENTION
    return f"transposed {kind.name}" if isinstance(kind, LinearKind) and kind.transposed else kind.name


def _collapse(values: Mapping[str, Any]) -> Any:
    """One value where all layers agree, else the value of each."""
    distinct = set(values.values())
    return distinct.pop() if len(distinct) == 1 else dict(sorted(values.items()))


def _some(names: list[str]) -> str:
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "") if names else "none"


def _brief(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:77]}..."
