"""Quantizing the frozen layers under the adapters of a model."""

from __future__ import annotations

import warnings
from collections.abc import Mapping

import torch
from torch import Tensor, nn

from lightning_lora import dependencies
from lightning_lora.errors import QuantizationError, listing
from lightning_lora.model.layers import require_adapters
from lightning_lora.model.merge import is_finite
from lightning_lora.model.progress import progress
from lightning_lora.nn.adapted import AdaptedLayer
from lightning_lora.nn.adapter import AdapterConfig
from lightning_lora.nn.base import QuantizedLinear, adopter_of, stored_weight
from lightning_lora.nn.experts import StackedWeight
from lightning_lora.nn.fingerprint import fingerprints
from lightning_lora.quantization.config import NF4Config, QuantizationConfig
from lightning_lora.quantization.expected_error import expected_error
from lightning_lora.quantization.formats import CONFIGS, FrozenLayer, linear_class, quantized_linear
from lightning_lora.quantization.nf4_stack import NF4Stack

_DEFAULT = NF4Config()


@torch.no_grad()
def quantize(
    model: nn.Module,
    config: QuantizationConfig = _DEFAULT,
    *,
    device: torch.device | str | None = None,
    hold: str = "buffers",
) -> nn.Module:
    """Quantize the base layer under every adapted layer of ``model``, in place, and return the model.

    Everything is checked before the first layer is touched. Layers are quantized one at a time, each original being
    freed before the next, so the extra memory is at most that of the largest layer (on the CPU at least some 15 MiB,
    which is what packing a piece of a layer takes there). A layer that is quantized already stays as
    it is, and so does one that :func:`check_quantizable` names.

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

    Raises:
        AdapterError: If the model has no adapters.
        QuantizationError: If a weight is on the meta device or not finite, if no layer can be quantized, or all are in
            another format already, or if a layer cannot be whose adapter has ``init="loftq"``.
        TypeError: If ``config`` is none.
        UnsupportedError: If bitsandbytes is not installed.
        ValueError: If ``hold`` is neither.
    """
    if hold not in ("buffers", "parameters"):
        raise ValueError(f"hold must be 'buffers' or 'parameters', got {hold!r}")
    _check_config(config)
    layers = require_adapters(model)
    kept = check_quantizable(layers, config, device)
    dense = {name: layer for name, layer in layers.items() if isinstance(layer.base_layer, nn.Linear | StackedWeight)}
    chosen = {name: layer for name, layer in dense.items() if name not in kept}
    if not chosen:
        _refuse_another_format(layers, config)
    _check_weights(chosen)
    _warn_of_plain_starts(chosen, config)
    _refuse_waiting({name: layer for name, layer in layers.items() if name not in chosen}, kept)
    origins = fingerprints({name: stored_weight(layer.base_layer) for name, layer in chosen.items()})
    for name, layer in progress(chosen.items(), "quantizing"):
        base = layer.base_layer
        layer.base_layer = quantized = _quantized(layer, base if device is None else base.to(device), config)
        if name in origins:  # the dense weight is gone from here on, and files tell by it which base they belong to
            quantized.remember(origins[name])
        if hold == "parameters":
            quantized.hold_as_parameters()
        if device is not None:
            layer.adapters.to(device)
        for name in layer.adapters:
            layer.adapter(name).rebase(base, quantized)
    return model


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
    kept = {}
    for name, layer in layers.items():
        base = layer.base_layer if isinstance(layer, AdaptedLayer) else layer
        if isinstance(base, QuantizedLinear) or adopter_of(base) is not None:
            continue
        reason = _refusal(base, config, device)
        if reason is not None:
            kept[name] = reason
    if layers and len(kept) == len(layers):
        reasons = listing(f"{name}: {reason}" for name, reason in kept.items())
        raise QuantizationError(
            f"none of the {len(layers)} adapted layers can be held in {config.name.upper()} ({reasons}). Use "
            "quantization=None"
        )
    return kept


def _refusal(base: nn.Module, config: QuantizationConfig, device: torch.device | str | None) -> str | None:
    """Why a layer stays dense, or None if it can be quantized."""
    label = config.name.upper()
    if isinstance(base, StackedWeight) and not isinstance(config, NF4Config):
        return f"experts are held in NF4 or not quantized, and this is {label}"
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
            f"quantization={config.name!r} loses {expected_error(config):.0%} of Gaussian weights (relative error; NF4 "
            f"{expected_error(_DEFAULT):.0%}), and the adapters of {listing(plain)} do not start from what is lost: "
            "training starts at another model. Use init='loftq', or quantization='nf4'",
            UserWarning,
            stacklevel=4,
        )


def _quantized(layer: AdaptedLayer, base: nn.Module, config: QuantizationConfig) -> FrozenLayer:
    """Quantize a base, without the start of the first active adapter that takes one off."""
    if isinstance(base, StackedWeight):  # adapters on experts take nothing off
        assert isinstance(config, NF4Config)
        return NF4Stack.from_stack(base, config)
    assert isinstance(base, nn.Linear)

    def rounded(weight: Tensor) -> Tensor:
        return quantized_linear(base, config, weight=weight).dequantize(torch.float32)

    for name in layer.active:
        rest = layer.adapter(name).take_off(base.weight.detach(), rounded)
        if rest is not None:
            layer.base_lacks = name
            return quantized_linear(base, config, weight=rest)
    return quantized_linear(base, config)


def _check_weights(layers: Mapping[str, AdaptedLayer]) -> None:
    for name, layer in layers.items():
        weight = layer.base_layer.weight
        assert isinstance(weight, torch.Tensor)
        if weight.is_meta:
            raise QuantizationError(f"{name} has no weight yet (meta device); load the weights before quantizing")
        if not is_finite(weight):
            raise QuantizationError(
                f"the base weight of {name} holds NaN or infinity: one such value would spoil its whole block. Mend "
                f"the base model, or pass exclude={name!r}"
            )
