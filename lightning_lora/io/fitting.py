"""Fitting a parsed adapter to a model: which layers it adapts, and whether every tensor has its place."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path

import torch
from torch import nn

from lightning_lora.errors import AdapterError, listing
from lightning_lora.io import peft
from lightning_lora.io.adapter_file import AGAIN, CONFIG, WEIGHTS, AdapterFile
from lightning_lora.io.description import describe, describe_configs, differences
from lightning_lora.io.fingerprint import compare
from lightning_lora.io.keys import PREFIX, canonical, leaves, shape_on_disk
from lightning_lora.io.notes import tell
from lightning_lora.model.layers import adapted_layers, adapter_names
from lightning_lora.model.parameters import trained_modules
from lightning_lora.model.split import layer_at, named_layers, part_names
from lightning_lora.model.targets import Plan
from lightning_lora.nn.adapted import AdaptedLayer
from lightning_lora.nn.adapter import AdapterConfig
from lightning_lora.nn.attention import SplitAttention
from lightning_lora.nn.conv import ConvKind
from lightning_lora.nn.kinds import has_kind, kind_of, why_not_adaptable
from lightning_lora.nn.linear import LinearKind
from lightning_lora.nn.low_rank import LowRankConfig
from lightning_lora.nn.split import Split
from lightning_lora.nn.vera import VeRAConfig


def plan_for(model: nn.Module, file: AdapterFile) -> Plan:
    """Decide which layers of the model the file adapts and how; everything in the file is checked against the model.

    Raises:
        AdapterError: If a tensor has no place, a layer no tensor, or a shape differs.
    """
    live = {canonical(path): path for path, _ in named_layers(model)}
    incomplete = [path for path, tensors in file.adapters.items() if len(tensors) < 2]
    if incomplete:
        raise AdapterError(f"{listing(incomplete)} has only one of {' and '.join(_factors(file))}. {AGAIN}")
    if not file.adapters:
        raise AdapterError(f"{WEIGHTS} holds no adapter. {AGAIN}")
    absent = [path for path in file.adapters if path not in live]
    if absent:
        here = [path for path in live if path and why_not_adaptable(layer_at(model, live[path])) is None]
        raise AdapterError(
            f"{len(absent)} of {len(file.adapters)} adapted layers are not in {type(model).__name__}: "
            f"{listing(absent, 3)}. Its linear layers are {listing(here, 3)}. Pass the module the adapter was trained "
            "on, which may be one level up or down"
        )
    linear = [path for path, real in live.items() if _is_adaptable(layer_at(model, real))]
    whole = _trained_whole(live, file)
    inside = tuple(f"{module}." for module in whole)
    named = file.settings.get("target_modules") or ()  # parameters are in it by their whole names, if they are
    modules = [path for path in linear if path in named or _is_module(model, live[path])]
    candidates = [path for path in modules if not f"{path}.".startswith(inside)]
    expected = peft.expected_layers(file.settings, [*candidates, *file.adapters])
    if expected is not None:
        missing, extra = sorted(expected - file.adapters.keys()), sorted(file.adapters.keys() - expected)
        if missing:
            raise AdapterError(f"{CONFIG} names layers that {WEIGHTS} has no tensors for: {listing(missing)}. {AGAIN}")
        if extra:
            raise AdapterError(f"{WEIGHTS} holds layers that {CONFIG} does not name: {listing(extra)}. {AGAIN}")
    configs = configs_of(file)
    _check_shapes(model, live, configs, file)
    if file.settings.get("fan_in_fan_out") and not any(_is_transposed(layer_at(model, live[p])) for p in configs):
        raise AdapterError(f"{CONFIG}: it uses fan_in_fan_out=True, and no layer of this model is transposed so")
    _check_trained(model, whole, file)
    train = tuple(live[module] for module in whole)
    order = {path: index for index, path in enumerate(live)}
    layers = {live[path]: configs[path] for path in sorted(configs, key=order.__getitem__)}
    return Plan(layers=layers, train=train, biases=tuple(live[path] for path in file.biases))


def configs_of(file: AdapterFile) -> dict[str, AdapterConfig]:
    """Return the config of each layer of a file.

    Raises:
        AdapterError: If a setting is broken, or is not what the header of the weights says it was.
    """
    try:
        configs = dict(file.configs or peft.from_peft(file.settings, file.adapters, file.metadata))
    except AdapterError as error:
        raise AdapterError(f"{CONFIG}: {error}. {AGAIN}") from None
    if file.metadata is not None:
        dropout = float(peft.dropout_in(file.settings))
        apart = differences(file.metadata, describe_configs(configs) | {"dropout": dropout})
        if apart:
            raise AdapterError(
                f"{CONFIG} and the header of {WEIGHTS} disagree, one was changed or they are of two saves: "
                f"{'; '.join(apart)}. {AGAIN}"
            )
    return configs


def require_same(model: nn.Module, plan: Plan, name: str) -> None:
    """Raise ``AdapterError`` unless adapter ``name`` of the model is of the same kind as the planned one."""
    here = describe(model, name) | {"train": _keys_of(model, trained_modules(model, name))}
    along = {"train": _keys_of(model, plan.train), "biases": sorted(map(canonical, plan.biases))}
    theirs = describe_configs({canonical(path): config for path, config in plan.layers.items()})
    apart = differences(theirs | along, here)
    if apart:
        raise AdapterError(f"the model already has an adapter {name!r} of another kind: {'; '.join(apart)}")


def require_free(model: nn.Module, file: AdapterFile, name: str) -> None:
    """Refuse to overwrite a module that is trained whole along with another adapter: there is one for all of them.

    Raises:
        AdapterError: Naming the module's tensors, unless they are equal.
    """
    state = {canonical(key): value for key, value in model.state_dict().items()}
    for other in (other for other in adapter_names(model) if other != name):
        inside = tuple(f"{canonical(module)}." for module in trained_modules(model, other))
        taken = [key.removeprefix(PREFIX) for key in file.others if key.removeprefix(PREFIX).startswith(inside)]
        changed = [key for key in taken if not torch.equal(state[key], file.others[PREFIX + key].to(state[key]))]
        if changed:
            raise AdapterError(
                f"{listing(changed)} is trained along with adapter {other!r}, which is in the model already, and would "
                "be overwritten: there is one such module for all adapters. Load this one into a copy of the base"
            )


def check_base(model: nn.Module, plan: Plan, file: AdapterFile, folder: Path, *, allow_mismatch: bool) -> None:
    """Compare the weights under the planned adapter with those it was trained on; log what cannot be compared.

    Raises:
        AdapterError: If they are others, and that is not allowed; the message names the layers.
    """
    if file.metadata is None:
        tell(
            f"{folder}: no header by lightning_lora, so neither tensors nor base model could be checked against "
            "what was saved"
        )
        return
    layers = {canonical(path): layer_at(model, path) for path in plan.layers}
    try:
        found = compare(file.metadata.get("base_fingerprint"), layers)
    except ValueError as error:
        raise AdapterError(f"{WEIGHTS} has a damaged header: {error}. {AGAIN}") from None
    if found.unchecked:
        reasons = listing(f"{path} ({why})" for path, why in found.unchecked.items())
        tell(f"{folder}: whether the base is the one trained on could not be checked in {reasons}")
    if found.differ and not allow_mismatch:
        raise AdapterError(
            f"{found}. Load the adapter into the base it was trained on (casting it afterwards is fine), or pass "
            "allow_base_mismatch=True"
        )


def _is_module(model: nn.Module, path: str) -> bool:
    """Whether a layer is a module to PEFT too, so that ``target_modules`` can name it, rather than a parameter."""
    place, _, name = path.rpartition(".")
    around = model.get_submodule(place)
    if isinstance(around, Split):
        return isinstance(around, SplitAttention) and name == "out_proj"
    return name in around._modules or name not in part_names(around)


def _is_adaptable(module: nn.Module) -> bool:
    return isinstance(module, AdaptedLayer) or why_not_adaptable(module) is None


def _is_transposed(layer: nn.Module) -> bool:
    kind = layer.kind if isinstance(layer, AdaptedLayer) else kind_of(layer)
    return isinstance(kind, LinearKind) and kind.transposed


def _check_shapes(
    model: nn.Module, live: Mapping[str, str], configs: Mapping[str, AdapterConfig], file: AdapterFile
) -> None:
    for path, config in configs.items():
        layer = layer_at(model, live[path])
        if not isinstance(layer, AdaptedLayer) and not has_kind(layer):
            raise AdapterError(f"{path} is a {type(layer).__name__} in this model, which cannot be adapted")
        kind = layer.kind if isinstance(layer, AdaptedLayer) else kind_of(layer)
        if isinstance(kind, ConvKind) and kind.groups > 1:
            raise AdapterError(
                f"{path} is a convolution in {kind.groups} groups, whose adapter is another function here"
            )
        assert isinstance(config, LowRankConfig | VeRAConfig)
        try:
            kind.check(config)
        except ValueError as error:
            raise AdapterError(f"{path}: {error}") from None
        rank, names = config.r, leaves(kind, config.method)
        for tensor, leaf in names.items():
            if leaf not in file.adapters[path]:
                raise AdapterError(f"{path} is a {type(layer).__name__} and the file has no {leaf} for it")
            found, shape = tuple(file.adapters[path][leaf].shape), shape_on_disk(kind, tensor, rank)
            if found != shape:
                raise AdapterError(
                    f"{path}.{tensor} has shape {found}, expected {shape} for r={rank} over this layer. "
                    "Load it into a model of the sizes it was trained on; if it is one, the file is damaged"
                )
        beyond = sorted(file.adapters[path].keys() - set(names.values()))
        if beyond:
            raise AdapterError(f"{path} has {listing(beyond)} in the file, which {config.method} does not. {AGAIN}")


def _trained_whole(live: Mapping[str, str], file: AdapterFile) -> tuple[str, ...]:
    """The modules the file holds whole. PEFT names them by the end of their name, and also some no model has."""
    ends = tuple(file.settings.get("modules_to_save") or ())
    keys = tuple(key.removeprefix(PREFIX) for key in file.others if key.startswith(PREFIX))
    held = [path for path in live if path.endswith(ends) and any(key.startswith(f"{path}.") for key in keys)]
    whole = tuple(path for path in held if not path.startswith(tuple(f"{outer}." for outer in held)))
    strangers = [key for key in file.others if not key.startswith(tuple(f"{PREFIX}{path}." for path in whole))]
    if strangers:
        raise AdapterError(
            f"{WEIGHTS} holds {listing(strangers)}: neither a tensor of an adapter nor of a module named in "
            "modules_to_save. Loading it would overwrite the base model"
        )
    absent = [
        end for end in ends if any(path.endswith(end) for path in live) and not any(p.endswith(end) for p in whole)
    ]
    if absent:
        raise AdapterError(f"{CONFIG} names {listing(absent)} in modules_to_save, but {WEIGHTS} has no tensors for it")
    return whole


def _check_trained(model: nn.Module, whole: tuple[str, ...], file: AdapterFile) -> None:
    """Check the tensors of modules trained whole against the model."""
    inside = tuple(f"{path}." for path in whole)
    adapted = [
        path for path in [*file.adapters, *map(canonical, adapted_layers(model))] if f"{path}.".startswith(inside)
    ]
    if adapted:
        raise AdapterError(f"modules_to_save holds {listing(adapted)} whole, which has an adapter too")
    state = {canonical(key): value for key, value in model.state_dict().items()}
    trained = {key.removeprefix(PREFIX): value for key, value in file.others.items()}
    for key, value in trained.items():
        if key not in state or state[key].shape != value.shape:
            has = f"shape {tuple(state[key].shape)}" if key in state else "no such tensor"
            raise AdapterError(f"{key} has shape {tuple(value.shape)} in the file, the model has {has}")
    lacking = [key for key in state if key.startswith(inside) and key not in trained]
    if lacking:
        raise AdapterError(f"{WEIGHTS} lacks {listing(lacking)} of a module named in modules_to_save")


def _factors(file: AdapterFile) -> tuple[str, str]:
    vera = file.settings["peft_type"] == "VERA"
    return ("vera_lambda_b", "vera_lambda_d") if vera else ("lora_A", "lora_B")


def _keys_of(model: nn.Module, modules: Iterable[str]) -> list[str]:
    """What the modules hold, by name: a container and the one layer in it with parameters hold the same."""
    inside = tuple(f"{module}." for module in modules)
    return sorted(canonical(key) for key in model.state_dict() if key.startswith(inside))
