"""The adapter folder: ``adapter_config.json`` and ``adapter_model.safetensors``, as PEFT reads and writes them."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from os import PathLike
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor, nn

from lightning_lora.errors import AdapterError, listing
from lightning_lora.io import peft
from lightning_lora.io.atomic import write_bytes
from lightning_lora.io.description import describe, describe_loras, differences
from lightning_lora.io.keys import PREFIX, adapter_key, canonical, split_adapter_key, trained_key
from lightning_lora.model.inject import apply, check_name
from lightning_lora.model.layers import adapted_layers, require_adapters
from lightning_lora.model.merge import is_finite
from lightning_lora.model.parameters import adapter_tensors, trained_modules, trained_outside_adapters
from lightning_lora.model.targets import Plan
from lightning_lora.nn.base import QuantizedLinear, why_not_linear
from lightning_lora.nn.linear import LoRALinear
from lightning_lora.nn.lora import LoRAConfig

WEIGHTS = "adapter_model.safetensors"
CONFIG = "adapter_config.json"
_METADATA = "lightning_lora"
_PICKLES = (".bin", ".pt", ".pth", ".ckpt")


def save_adapter(model: nn.Module, path: str | PathLike[str], name: str = "default") -> None:
    """Write adapter ``name`` and the modules trained along with it to a folder that PEFT can load.

    Layers are named as in ``model``: pass the module you will load the adapter into. Each file is complete or absent,
    and a reader of ours notices if the two are from different saves.

    Raises:
        AdapterError: If there is no such adapter, if it holds NaN, or if the format cannot hold it.
        OSError: If the folder cannot be written; an adapter that was there before is untouched.
    """
    layers = {path: layer for path, layer in require_adapters(model, name).items() if name in layer.adapters}
    settings = peft.to_peft(
        {canonical(path): layer.adapter(name).config for path, layer in layers.items()},
        names=_module_names(model),
        train=map(canonical, trained_modules(model)),
    )
    tensors = adapter_state_dict(model, name)
    broken = [key for key, tensor in tensors.items() if not is_finite(tensor)]
    if broken:
        raise AdapterError(
            f"NaN or infinity in {listing(broken)}; not written. The training diverged: go back to an earlier "
            "checkpoint"
        )
    metadata = {"format": "pt", _METADATA: json.dumps(describe(model, name), sort_keys=True)}
    folder = Path(path)
    folder.mkdir(parents=True, exist_ok=True)
    write_bytes(folder / WEIGHTS, save({key: t.cpu().contiguous() for key, t in tensors.items()}, metadata))
    write_bytes(folder / CONFIG, peft.dump(settings))


def adapter_state_dict(model: nn.Module, name: str = "default") -> dict[str, Tensor]:
    """Return the tensors of adapter ``name``, and of modules trained along with it, by their on-disk names.

    Raises:
        AdapterError: If there is no such adapter, or a parameter is trained that belongs neither to it nor to a whole
            trained module.
    """
    adapters = adapter_tensors(model, name)
    found = {adapter_key(path, key): tensor for path, tensors in adapters.items() for key, tensor in tensors.items()}
    whole = trained_modules(model)
    stray = [p for p in trained_outside_adapters(model) if not p.startswith(tuple(f"{module}." for module in whole))]
    if stray:
        raise AdapterError(
            f"{listing(stray)} is trained but part of no adapter, so an adapter folder cannot hold it. Name its module "
            "in train="
        )
    for module in whole:
        state = model.get_submodule(module).state_dict()
        found |= {trained_key(f"{module}.{key}"): tensor.detach() for key, tensor in state.items()}
    return found


def load_adapter(model: nn.Module, path: str | PathLike[str], name: str | None = None) -> nn.Module:
    """Load an adapter folder, ours or PEFT's, into ``model``, in place, and return the model.

    The adapter is injected if the model has none of that name, with the rank, scaling and targets of the file;
    otherwise it has to match the one that is there. Everything is checked before anything changes.

    Args:
        model: The base model the adapter was trained on, plain or with adapters.
        path: The folder.
        name: What to call the adapter here; None means ``"default"``.

    Raises:
        AdapterError: If the folder is not there, damaged, a pickle, or does not fit the model; the message names the
            file and the key.
        TargetError: If a layer of the model cannot be adapted.
    """
    name = "default" if name is None else name
    check_name(name)
    folder = Path(path)
    try:
        file = _read(folder)
        plan = _plan(model, file)
        present = adapted_layers(model).values()
        if any(name in layer.adapters for layer in present):
            _require_same(model, plan, name)
        else:
            apply(model, plan, name=name)
    except AdapterError as error:
        raise AdapterError(f"{folder}: {error}") from None
    _fill(model, file, name)
    return model


@dataclass(frozen=True)
class _File:
    """A parsed adapter folder: its settings, its tensors by layer, and those of modules trained whole by name."""

    settings: Mapping[str, Any]
    adapters: Mapping[str, Mapping[str, Tensor]]
    trained: Mapping[str, Tensor]
    metadata: Mapping[str, Any] | None


def _read(folder: Path) -> _File:
    if folder.is_file():
        pickled = folder.suffix in _PICKLES
        raise AdapterError(_PICKLE if pickled else f"is a file; pass the folder that holds {CONFIG} and {WEIGHTS}")
    if not folder.is_dir():
        raise AdapterError("no such folder")
    absent = [file for file in (CONFIG, WEIGHTS) if not (folder / file).is_file()]
    if WEIGHTS in absent and any(p.suffix in _PICKLES for p in folder.iterdir()):
        raise AdapterError(_PICKLE)
    if absent:
        raise AdapterError(f"{listing(absent)} is missing; a complete adapter has both {CONFIG} and {WEIGHTS}")
    try:
        settings = peft.parse((folder / CONFIG).read_bytes())
    except AdapterError as error:
        raise AdapterError(f"{CONFIG}: {error}") from None
    tensors, metadata = _read_tensors(folder / WEIGHTS)
    whole = tuple(f"{PREFIX}{module}." for module in settings.get("modules_to_save") or ())
    adapters: dict[str, dict[str, Tensor]] = {}
    trained, strangers = {}, []
    for key, tensor in tensors.items():
        split = split_adapter_key(key)
        if split is not None:
            adapters.setdefault(split[0], {})[split[1]] = tensor
        elif whole and key.startswith(whole):
            trained[key.removeprefix(PREFIX)] = tensor
        else:
            strangers.append(key)
    if strangers:
        raise AdapterError(
            f"{WEIGHTS} holds {listing(strangers)}: neither a tensor of an adapter nor of a module named in "
            "modules_to_save. "
            "Loading it would overwrite the base model"
        )
    return _File(settings, adapters, trained, metadata)


_PICKLE = (
    "holds a pickle, which can run code when it is read; refused. In a place you trust, convert it: "
    "safetensors.torch.save_file(torch.load(file, weights_only=True), 'adapter_model.safetensors')"
)


def _read_tensors(path: Path) -> tuple[dict[str, Tensor], dict[str, Any] | None]:
    try:
        with safe_open(path, "pt") as file:
            tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118 (a safe_open is no mapping)
            metadata = (file.metadata() or {}).get(_METADATA)
    except (SafetensorError, OSError) as error:
        raise AdapterError(f"{path.name} is truncated or no safetensors file ({error})") from None
    broken = [key for key, tensor in tensors.items() if not tensor.is_floating_point() or not is_finite(tensor)]
    if broken:
        raise AdapterError(f"{path.name} holds NaN, infinity or integers in {listing(broken)}")
    try:
        return tensors, None if metadata is None else dict(json.loads(metadata))
    except (TypeError, ValueError):
        raise AdapterError(f"{path.name} has a damaged header") from None


def _plan(model: nn.Module, file: _File) -> Plan:
    """Which layers of the model the file adapts and how; everything in the file is checked against the model."""
    live = {canonical(path): path for path, module in model.named_modules()}
    incomplete = [path for path, tensors in file.adapters.items() if set(tensors) != {"lora_A", "lora_B"}]
    if incomplete:
        raise AdapterError(f"{listing(incomplete)} has only one of lora_A and lora_B")
    if not file.adapters:
        raise AdapterError(f"{WEIGHTS} holds no adapter")
    absent = [path for path in file.adapters if path not in live]
    if absent:
        here = [path for path in live if path and why_not_linear(model.get_submodule(live[path])) is None]
        raise AdapterError(
            f"{len(absent)} of {len(file.adapters)} adapted layers are not in {type(model).__name__}: "
            f"{listing(absent, 3)}. "
            f"Its linear layers are {listing(here, 3)}. Pass the module the adapter was trained on, which may be one "
            "level up or down"
        )
    linear = [path for path, real in live.items() if _is_adaptable(model.get_submodule(real))]
    expected = peft.expected_layers(file.settings, linear)
    missing = sorted((expected or set()) - file.adapters.keys())
    if missing:
        raise AdapterError(f"{CONFIG} names layers that {WEIGHTS} has no tensors for: {listing(missing)}")
    configs = peft.from_peft(file.settings, file.adapters)
    if file.metadata is not None:
        apart = differences(file.metadata, describe_loras(configs))
        if apart:
            raise AdapterError(
                f"{CONFIG} and the header of {WEIGHTS} disagree, one was changed or they are of two saves: "
                f"{'; '.join(apart)}"
            )
    _check_shapes(model, live, configs, file)
    train = tuple(live[m] for m in file.settings.get("modules_to_save") or () if m in live)
    order = {path: index for index, path in enumerate(live)}
    return Plan(layers={live[path]: configs[path] for path in sorted(configs, key=order.__getitem__)}, train=train)


def _is_adaptable(module: nn.Module) -> bool:
    return isinstance(module, LoRALinear) or why_not_linear(module) is None


def _check_shapes(model: nn.Module, live: Mapping[str, str], configs: Mapping[str, LoRAConfig], file: _File) -> None:
    for path, config in configs.items():
        layer = model.get_submodule(live[path])
        if not isinstance(layer, nn.Linear | QuantizedLinear | LoRALinear):
            raise AdapterError(f"{path} is a {type(layer).__name__} in this model, which is no linear layer")
        wanted = {"lora_A": (config.r, layer.in_features), "lora_B": (layer.out_features, config.r)}
        for tensor, shape in wanted.items():
            found = tuple(file.adapters[path][tensor].shape)
            if found != shape:
                raise AdapterError(
                    f"{path}.{tensor} has shape {found}, expected {shape} for r={config.r} over this layer"
                )
    state = {canonical(_without_hosts(key)): value for key, value in model.state_dict().items()}
    for key, value in file.trained.items():
        if key not in state or state[key].shape != value.shape:
            has = f"shape {tuple(state[key].shape)}" if key in state else "no such tensor"
            raise AdapterError(f"{key} has shape {tuple(value.shape)} in the file, the model has {has}")
    for module in file.settings.get("modules_to_save") or ():
        lacking = [key for key in state if key.startswith(f"{module}.") and key not in file.trained]
        if module not in live or lacking:
            raise AdapterError(f"modules_to_save names {module!r}, but {listing(lacking) or 'the model'} is missing")


def _require_same(model: nn.Module, plan: Plan, name: str) -> None:
    here = describe(model, name)
    theirs = describe_loras({canonical(p): c for p, c in plan.layers.items() if isinstance(c, LoRAConfig)})
    apart = differences(theirs | {"train": sorted(map(canonical, plan.train))}, here)
    if apart:
        raise AdapterError(f"the model already has an adapter {name!r} of another kind: {'; '.join(apart)}")


@torch.no_grad()
def _fill(model: nn.Module, file: _File, name: str) -> None:
    for path, layer in adapted_layers(model).items():
        if name in layer.adapters:
            tensors = file.adapters[canonical(path)]
            for key, parameter in layer.adapter(name).named_parameters():
                parameter.copy_(tensors[key])
    state = {canonical(key): tensor for key, tensor in model.state_dict().items()}
    for key, tensor in file.trained.items():
        state[key].copy_(tensor)


def _module_names(model: nn.Module) -> Iterable[str]:
    """Names of the model's modules as they are without adapters."""
    inside = tuple(f"{path}." for path in adapted_layers(model))
    return [canonical(path) for path, _ in model.named_modules() if path and not (inside and path.startswith(inside))]


def _without_hosts(key: str) -> str:
    return key.replace(".base_layer.", ".")
