"""Quantizing the frozen layers under the adapters of a model."""

from __future__ import annotations

import warnings
from collections.abc import Mapping

import torch
from torch import Tensor, nn

from lightning_lora import dependencies
from lightning_lora.errors import QuantizationError, listing
from lightning_lora.model.layers import replace, require_adapters
from lightning_lora.model.progress import progress
from lightning_lora.nn.adapted import AdaptedLayer
from lightning_lora.nn.adapter import AdapterConfig
from lightning_lora.nn.base import QuantizedLinear, adopter_of, share_hooks, stored_weight
from lightning_lora.nn.experts import StackedWeight
from lightning_lora.nn.fingerprint import fingerprints
from lightning_lora.quantization.config import NF4Config, QuantizationConfig
from lightning_lora.quantization.edges import EMBEDDINGS, base_of, check_embeddings, edges
from lightning_lora.quantization.expected_error import lossy
from lightning_lora.quantization.formats import CONFIGS, FrozenLayer, linear_class, quantized_linear
from lightning_lora.quantization.frozen_linear import FrozenLinear
from lightning_lora.quantization.pack import pack, require_finite

_DEFAULT = NF4Config()


@torch.no_grad()
def quantize(
    model: nn.Module,
    config: QuantizationConfig = _DEFAULT,
    *,
    device: torch.device | str | None = None,
    hold: str = "buffers",
    embeddings: str | None = None,
) -> nn.Module:
    """Quantize the base layer under every adapted layer of ``model``, in place, and return the model.

    Everything is checked before the first layer is touched. Layers are quantized one at a time, each original being
    freed before the next, so the extra memory is at most that of the largest layer (on the CPU at least some 15 MiB,
    which is what packing a piece of a layer takes there). A layer that is quantized already is
    not quantized again, and one that :func:`check_quantizable` names stays as it is.

    Under an adapter that starts in the weight (PiSSA, OLoRA, LoftQ) what is quantized is the weight without that start,
    ``Q = quantized(W - s B0 A0)``, where that brings ``deq(Q) + s B A`` nearer to ``W`` than plain quantization; it
    takes a few copies of the layer more while it is computed.

    Formats that lose too much of a weight for adapters that do not start from what is lost (NF2 without
    ``init="loftq"``) warn, with the error to expect.

    Args:
        model: A model with adapters.
        config: How to store the weights.
        device: Where to quantize, and where the packed layers then are; None keeps each layer where it is.
        hold: What packed weights are in their module: ``"buffers"``, or ``"parameters"``, which FSDP2 shards.
        embeddings: ``"int8"`` stores embeddings and output heads in 8 bit, with an adapter or without, whatever
            ``config`` says; a merge makes all of them dense again. None leaves those without an adapter as they are.

    Raises:
        AdapterError: If the model has no adapters.
        QuantizationError: If a weight is on the meta device or not finite, if no layer can be quantized, or all are in
            another format already, if a layer cannot be whose adapter has ``init="loftq"``, or if ``embeddings`` are
            asked for and there are none, or one shares its weight with another layer.
        TypeError: If ``config`` is none.
        UnsupportedError: If bitsandbytes is not installed.
        ValueError: If ``hold`` or ``embeddings`` is none of the choices.
    """
    if hold not in ("buffers", "parameters"):
        raise ValueError(f"hold must be 'buffers' or 'parameters', got {hold!r}")
    _check_config(config)
    check_embeddings(embeddings)
    layers = require_adapters(model)
    waiting = {} if embeddings is None else edges(model)[0]
    configs: dict[str, QuantizationConfig] = dict.fromkeys(waiting, EMBEDDINGS[embeddings or "int8"])
    layers = {name: layer for name, layer in layers.items() if name not in waiting}
    kept = check_quantizable(layers, config, device)
    dense = {name: layer for name, layer in layers.items() if isinstance(layer.base_layer, nn.Linear | StackedWeight)}
    chosen = {name: layer for name, layer in dense.items() if name not in kept}
    if not chosen:
        _refuse_another_format(layers, config)
    waiting |= chosen
    _check_weights(waiting)
    _warn_of_plain_starts(chosen, config)
    _refuse_waiting({name: layer for name, layer in layers.items() if name not in chosen}, kept)
    origins = fingerprints({name: stored_weight(base_of(layer)) for name, layer in waiting.items()})
    for name in progress(list(waiting), "quantizing"):
        layer = waiting.pop(name)  # so that it can be freed before the next
        quantized = _quantize(layer, configs.get(name, config), device)
        quantized.edge = name in configs
        if name in origins:  # the dense weight is gone from here on, and files tell by it which base they belong to
            quantized.remember(origins[name])
        if not isinstance(layer, AdaptedLayer):
            share_hooks(layer, quantized)
            replace(model, {layer: quantized})
    if hold == "parameters":  # those that were packed when they were loaded too
        for module in model.modules():
            if isinstance(module, FrozenLinear):
                module.hold_as_parameters()
    return model


def _quantize(layer: nn.Module, config: QuantizationConfig, device: torch.device | str | None) -> FrozenLayer:
    """Return the quantized base of a layer; an adapted one stands on it from then on."""
    base = base_of(layer)
    moved = base if device is None else base.to(device)
    if not isinstance(layer, AdaptedLayer):
        return pack(moved, config)
    layer.base_layer = quantized = _quantized(layer, moved, config)
    if device is not None:
        layer.adapters.to(device)
    for name in layer.adapters:
        layer.adapter(name).rebase(base, quantized)
    return quantized


def _check_config(config: object) -> None:
    if type(config) in CONFIGS.values():
        return
    meant = CONFIGS[config] if isinstance(config, str) and config in CONFIGS else NF4Config
    raise TypeError(f"config must be the config of a storage, such as {meant.__name__}(), got {config!r}")


def _refuse_another_format(layers: Mapping[str, AdaptedLayer], config: QuantizationConfig) -> None:
    """Refuse to leave everything in another format than was asked for, where it was ours to choose."""
    bases = {name: layer.base_layer for name, layer in layers.items()}
    ours = {name: base.storage for name, base in bases.items() if isinstance(base, QuantizedLinear) and base.origin}
    other = {name: storage for name, storage in ours.items() if storage.partition("/")[0] != config.name}
    if other:
        raise QuantizationError(
            f"{listing(f'{name} ({storage})' for name, storage in other.items())} is quantized already, and goes from "
            f"one format to another only by way of its original weights. Load the base anew, and quantize that to "
            f"{config.name.upper()}"
        )


def check_quantizable(
    layers: Mapping[str, nn.Module], config: QuantizationConfig = _DEFAULT, device: torch.device | str | None = None
) -> dict[str, str]:
    """Return the layers a format cannot hold on their device (or on ``device``), with the reason; they stay dense.

    Args:
        layers: Linear layers by name, with adapters or without.
        config: How they would be stored.
        device: Where they would be quantized.

    Raises:
        QuantizationError: If there are layers and none of them can be held.
        UnsupportedError: If bitsandbytes is not installed.
    """
    dependencies.bitsandbytes(f"quantization={config.name!r}")
    dense = _dense_bases(layers)
    kept = refusals(layers, config, device)
    for name, base in dense.items():
        reason = linear_class(config).refusal_of_values(stored_weight(base).detach()) if name not in kept else None
        if reason is not None:
            kept[name] = reason
    refuse_none_left(layers, kept, config)
    return kept


def refusals(
    layers: Mapping[str, nn.Module], config: QuantizationConfig, device: torch.device | str | None = None
) -> dict[str, str]:
    """Return the layers that stay dense whatever their values are, with the reason.

    Args:
        layers: Linear layers by name, with adapters or without.
        config: How they would be stored.
        device: Where they would be quantized; None is where each of them is.
    """
    reasons = {name: _refusal(base, config, device) for name, base in _dense_bases(layers).items()}
    return {name: reason for name, reason in reasons.items() if reason is not None}


def refuse_none_left(layers: Mapping[str, nn.Module], kept: Mapping[str, str], config: QuantizationConfig) -> None:
    """Raise ``QuantizationError`` if there are layers and all of them stay dense."""
    if layers and len(kept) == len(layers):
        reasons = listing(f"{name}: {reason}" for name, reason in kept.items())
        raise QuantizationError(
            f"none of the {len(layers)} adapted layers can be held in {config.name.upper()} ({reasons}). Use "
            "quantization=None"
        )


def _dense_bases(layers: Mapping[str, nn.Module]) -> dict[str, nn.Module]:
    """The layers, or those under their adapters, that are in few bits nowhere yet."""
    bases = {n: layer.base_layer if isinstance(layer, AdaptedLayer) else layer for n, layer in layers.items()}
    return {
        name: base for name, base in bases.items() if not isinstance(base, QuantizedLinear) and adopter_of(base) is None
    }


def _refusal(base: nn.Module, config: QuantizationConfig, device: torch.device | str | None) -> str | None:
    """Why a layer stays dense, or None if it can be quantized."""
    label = config.name.upper()
    if not isinstance(base, nn.Linear | StackedWeight):
        return f"{label} holds linear layers, and this is a {type(base).__name__}"
    where = torch.device(device) if device is not None else base.weight.device
    return linear_class(config).refusal(base.weight.detach(), where)


def refuse_unfitted(configs: Mapping[str, AdapterConfig], kept: Mapping[str, str]) -> None:
    """Refuse adapters that start where their base is quantized, over bases that are not going to be.

    Args:
        configs: The config of each layer's adapter.
        kept: Layers that stay as they are, with the reason.

    Raises:
        QuantizationError: Naming them.
    """
    waiting = [f"{name} ({kept[name]})" for name in kept if configs[name].starts_from == "quantization"]
    if waiting:
        raise QuantizationError(
            f"init='loftq' fits an adapter to a base that is being quantized, which cannot be done for "
            f"{listing(waiting)}. Exclude it, or give it another init in targets={{name: LoRAConfig(...)}}"
        )


def _refuse_waiting(layers: Mapping[str, AdaptedLayer], kept: Mapping[str, str]) -> None:
    """Refuse what :func:`refuse_unfitted` does, of the adapters that are in the model already and not fitted yet."""
    waiting = {
        name: adapter.config
        for name, layer in layers.items()
        for adapter in map(layer.adapter, layer.adapters)
        if not adapter.started
    }
    refuse_unfitted(waiting, {name: kept.get(name, "it is quantized already") for name in waiting})


def _warn_of_plain_starts(layers: Mapping[str, AdaptedLayer], config: QuantizationConfig) -> None:
    """Say beforehand what a run over so coarse a base starts with."""
    plain = [
        name
        for name, layer in layers.items()
        if not any(layer.adapter(active).config.starts_from == "quantization" for active in layer.active)
    ]
    if config.needs_start and plain:
        warnings.warn(
            f"{lossy(config)}, and the adapters of {listing(plain)} do not start from what is lost: "
            "training starts at another model. Use init='loftq', or quantization='nf4'",
            UserWarning,
            stacklevel=4,
        )


def _quantized(layer: AdaptedLayer, base: nn.Module, config: QuantizationConfig) -> FrozenLayer:
    """Quantize a base, without the start of the first active adapter that takes one off."""
    if not isinstance(base, nn.Linear):  # adapters on experts and embeddings take nothing off
        return pack(base, config)

    def rounded(weight: Tensor) -> Tensor:
        return quantized_linear(base, config, weight=weight).dequantize(torch.float32)

    for name in layer.active:
        rest = layer.adapter(name).take_off(base.weight.detach(), rounded)
        if rest is not None:
            layer.base_lacks = name
            return quantized_linear(base, config, weight=rest)
    return pack(base, config)


def _check_weights(layers: Mapping[str, nn.Module]) -> None:
    for name, layer in layers.items():
        weight = stored_weight(base_of(layer))
        if weight.is_meta:
            raise QuantizationError(f"{name} has no weight yet (meta device); load the weights before quantizing")
        require_finite(name, base_of(layer))
