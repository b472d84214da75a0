"""Putting adapters into a model."""

from __future__ import annotations

import re
from collections.abc import Iterable

import torch
from torch import nn
from torch.nn.parameter import is_lazy

from lightning_lora.errors import AdapterError, LoRAError, TargetError, listing
from lightning_lora.model.active import activate
from lightning_lora.model.biases import hand_over_note, refuse_shared, refuse_taken_apart, train_bias_of
from lightning_lora.model.layers import adapted_layers, adapter_names, replace
from lightning_lora.model.parameters import mark_trained
from lightning_lora.model.progress import progress
from lightning_lora.model.split import module_around, place_of, taken_apart
from lightning_lora.model.targets import ALL_LINEAR, Plan, Targets, refuse_tied, resolve
from lightning_lora.nn.adapted import AdaptedLayer
from lightning_lora.nn.adapter import Adapter, AdapterConfig
from lightning_lora.nn.base import QuantizedLinear, hand_over_hooks, weight_device, weight_dtype
from lightning_lora.nn.kinds import as_base
from lightning_lora.nn.lora import LoRAConfig
from lightning_lora.nn.split import Split

_NAME = re.compile(r"[A-Za-z0-9_-]{1,64}")
_DEFAULT = LoRAConfig()


def inject(
    model: nn.Module,
    targets: Targets = ALL_LINEAR,
    config: AdapterConfig = _DEFAULT,
    *,
    exclude: Iterable[str] = (),
    train: Iterable[str] = (),
    train_bias: str = "none",
    name: str = "default",
) -> nn.Module:
    """Put adapters into ``model``, in place, and return it. Everything but the adapters is frozen.

    All or nothing: whatever is wrong is found before the first layer is replaced. Adapters are made in ``float32`` over
    a half-precision base (they are the master weights) and on the device of the layer below; on the meta device nothing
    is allocated.

    Args:
        model: Any module with linear layers inside; ``bitsandbytes.nn.Linear4bit`` layers are taken over as they are.
        targets: ``"all-linear"`` (every linear layer but the output head), a pattern or several, or a mapping from
            pattern to config. See :mod:`lightning_lora.model.targets`.
        config: The method and its hyperparameters.
        exclude: Patterns of layers to pass over.
        train: Patterns of modules to train whole beside the adapters, and to save along with them.
        train_bias: Biases to train and save along: ``"none"``, ``"adapted"`` (of the layers that are adapted) or
            ``"all"``. A layer has one bias for all its adapters, so the base without adapters is then not the one from
            before.
        name: The adapter's name. A model can hold several; the new one becomes the active one.

    Raises:
        AdapterError: If the model already holds an adapter of that name, or the name is not ``[A-Za-z0-9_-]{1,64}``.
        TargetError: If a pattern, or the plan as a whole, does not fit the model.
    """
    check_name(name)
    return apply(model, resolve(model, targets, config, exclude=exclude, train=train, train_bias=train_bias), name=name)


def apply(
    model: nn.Module,
    plan: Plan,
    *,
    name: str = "default",
    device: torch.device | None = None,
    start: bool = True,
) -> nn.Module:
    """Carry out a plan, in place, and return the model.

    Args:
        model: Any module.
        plan: What to do.
        name: The adapter's name.
        device: Where weights are decomposed for adapters that start from them; None is where each weight is.
        start: Whether adapters take their starts from the base now; not if their state is loaded next.
    """
    if name in adapter_names(model):
        raise AdapterError(
            f"the model already holds an adapter {name!r} (on {listing(adapted_layers(model))}). Pass another name to "
            f"add a second one, or delete_adapter(model, {name!r}) first"
        )
    places = {place_of(model, path): path for path in plan.layers}
    if "" in places:
        raise TargetError(
            "the model is itself the layer to adapt and cannot replace itself; wrap it, e.g. in nn.Sequential"
        )
    lazy = [path for path, parameter in model.named_parameters() if is_lazy(parameter)]
    if lazy:
        raise TargetError(f"{listing(lazy)} is lazy and has no shape yet; run the model once on a batch first")
    compiled = [path for path in places if path.rpartition(".")[2] == "_orig_mod"]
    if compiled:
        raise TargetError(
            f"{listing(compiled)} was compiled by itself and would go on computing the old layer. Compile the module "
            f"around it, or after injection, or exclude={compiled[0]!r}"
        )
    refuse_tied(model, plan.layers)
    refuse_shared(model, plan.biases)
    refuse_taken_apart(model, [place for place, path in places.items() if place != path])
    hosts, adapters = {}, {}
    splits: dict[nn.Module, Split] = {}
    configs: list[AdapterConfig] = []
    for path, config in progress(plan.layers.items(), "starting adapters"):
        layer = _layer(model, path, splits)
        hosts[layer] = host = _host(path, layer)
        adapters[host] = _build(host, _one_of(configs, config))
        if start:
            _start(path, host, adapters[host], device)
    rows = next((layer.rows for layer in adapted_layers(model).values()), None)
    for host, adapter in adapters.items():
        host.put(name, adapter)
        host.rows = rows  # within disabled() or routed() a new layer computes what the others do
    _split(model, splits)
    if not adapted_layers(model):  # a later adapter leaves trainable what an earlier one trains along
        model.requires_grad_(False)
    for layer, host in hosts.items():
        if layer is not host:
            host.base_layer.requires_grad_(False)
            hand_over_hooks(layer, host)
            hand_over_note(layer, host)
    replace(model, {layer: host for layer, host in hosts.items() if layer is not host})
    for path in plan.train:
        mark_trained(model.get_submodule(path).requires_grad_(True), name)
    for path in plan.biases:
        train_bias_of(model.get_submodule(path), name)
    activate(model, name)
    return model


def check_name(name: str) -> None:
    """Raise ``AdapterError`` unless ``name`` can become part of state-dict keys and file paths."""
    if not isinstance(name, str) or not _NAME.fullmatch(name):
        raise AdapterError(f"adapter name {name!r} must be 1 to 64 letters, digits, '_' or '-'")
    if hasattr(nn.ModuleDict, name):
        raise AdapterError(
            f"adapter name {name!r} is taken: torch's ModuleDict has an attribute called so. Choose another"
        )


def _layer(model: nn.Module, path: str, splits: dict[nn.Module, Split]) -> nn.Module:
    """The layer at a path; a module that has to be taken apart for it is noted, and taken apart once."""
    around = module_around(model, path)
    if around is None:
        return model.get_submodule(path)
    if around not in splits:
        splits[around] = taken_apart(around)
    return splits[around].get_submodule(path.rpartition(".")[2])


def _split(model: nn.Module, splits: dict[nn.Module, Split]) -> None:
    """Put modules taken apart in place, freeing each packed weight before the next is copied."""
    while splits:
        module, split = splits.popitem()
        module.requires_grad_(False)  # an optimizer may hold the packed weight, and is to let go of it
        hand_over_hooks(module, split)
        replace(model, {module: split})
        del module
        split.own_memory()


def _host(path: str, layer: nn.Module) -> AdaptedLayer:
    if isinstance(layer, AdaptedLayer):
        return layer
    try:
        return AdaptedLayer(as_base(layer))
    except (TypeError, LoRAError) as error:
        raise TargetError(f"{path} cannot be adapted: {error}") from None


def _build(host: AdaptedLayer, config: AdapterConfig) -> Adapter:
    dtype = torch.promote_types(weight_dtype(host.base_layer), torch.float32)
    return config.build(host.base_layer, device=weight_device(host.base_layer), dtype=dtype).train(host.training)


def _start(path: str, host: AdaptedLayer, adapter: Adapter, device: torch.device | None) -> None:
    if adapter.config.starts_from == "quantization" and isinstance(host.base_layer, QuantizedLinear):
        raise TargetError(
            f"{path} is quantized already, so its base cannot be fitted to an adapter any more. Use init='pissa' or "
            "'kaiming' there, or start from the dense model and let quantize(...) do it"
        )
    try:
        adapter.start(lambda: host.base_weight().to(device or host.device))
    except ValueError as error:
        raise TargetError(f"{path}: {error}, or exclude={path!r}") from None


def _one_of(configs: list[AdapterConfig], config: AdapterConfig) -> AdapterConfig:
    """Return the config among ``configs`` that equals this one, which becomes one of them if none does.

    torch.compile guards which layers share one object: adapters of equal configs then fit the same graph, wherever
    their configs came from.
    """
    if config not in configs:
        configs.append(config)
    return configs[configs.index(config)]
