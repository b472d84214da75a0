"""The adapter folder: ``adapter_config.json`` and ``adapter_model.safetensors``, as PEFT reads and writes them."""

from __future__ import annotations

from collections.abc import Iterable
from os import PathLike
from pathlib import Path

import torch
from torch import Tensor, nn

from lightning_lora.errors import AdapterError, listing
from lightning_lora.io import adapter_file, peft
from lightning_lora.io.adapter_file import AdapterFile
from lightning_lora.io.description import describe, describe_loras
from lightning_lora.io.fitting import plan_for, require_same
from lightning_lora.io.keys import PREFIX, adapter_key, canonical, trained_key
from lightning_lora.model.inject import apply, check_name
from lightning_lora.model.layers import adapted_layers
from lightning_lora.model.merge import is_finite
from lightning_lora.model.parameters import (
    adapter_tensors,
    plain_adapters,
    trained_modules,
    trained_outside_adapters,
)
from lightning_lora.nn.lora import LoRAConfig


def save_adapter(model: nn.Module, path: str | PathLike[str], name: str = "default") -> None:
    """Write adapter ``name`` and the modules trained along with it to a folder that PEFT can load.

    Layers are named as in ``model``: pass the module you will load the adapter into. Each file is complete or absent,
    and a reader of ours notices if the two are from different saves. An adapter that started in the base weight (PiSSA,
    OLoRA, LoftQ) is written as the plain LoRA of twice its rank that makes the same change to the original base.

    Raises:
        AdapterError: If there is no such adapter, if it holds NaN, or if the format cannot hold it.
        OSError: If the folder cannot be written; an adapter that was there before is untouched.
    """
    configs = {canonical(path): adapter.config for path, adapter in plain_adapters(model, name).items()}
    settings = peft.to_peft(
        configs,
        names=_module_names(model),
        train=map(canonical, trained_modules(model, name)),
    )
    tensors = adapter_state_dict(model, name)
    broken = [key for key, tensor in tensors.items() if not is_finite(tensor)]
    if broken:
        raise AdapterError(
            f"NaN or infinity in {listing(broken)}; not written. The training diverged: go back to an earlier "
            "checkpoint"
        )
    loras = {path: config for path, config in configs.items() if isinstance(config, LoRAConfig)}
    adapter_file.write(Path(path), tensors, settings, describe(model, name) | describe_loras(loras))


def adapter_state_dict(model: nn.Module, name: str = "default") -> dict[str, Tensor]:
    """Return the tensors of adapter ``name``, and of modules trained along with it, by their on-disk names.

    Raises:
        AdapterError: If there is no such adapter, or a parameter is trained that belongs neither to it nor to a whole
            trained module.
    """
    adapters = adapter_tensors(model, name)
    found = {adapter_key(path, key): tensor for path, tensors in adapters.items() for key, tensor in tensors.items()}
    whole = trained_modules(model, name)
    held = {id(parameter) for module in whole for parameter in model.get_submodule(module).parameters()}
    stray = [path for path in trained_outside_adapters(model) if id(model.get_parameter(path)) not in held]
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
        file = adapter_file.read(folder)
        plan = plan_for(model, file)
        present = adapted_layers(model).values()
        if any(name in layer.adapters for layer in present):
            require_same(model, plan, name)
        else:
            apply(model, plan, name=name)
    except AdapterError as error:
        raise AdapterError(f"{folder}: {error}") from None
    _fill(model, file, name)
    return model


@torch.no_grad()
def _fill(model: nn.Module, file: AdapterFile, name: str) -> None:
    for path, layer in adapted_layers(model).items():
        if name in layer.adapters:
            tensors = file.adapters[canonical(path)]
            for key, parameter in layer.adapter(name).named_parameters():
                parameter.copy_(tensors[key])
    state = {canonical(key): tensor for key, tensor in model.state_dict().items()}
    for key, tensor in file.others.items():
        state[key.removeprefix(PREFIX)].copy_(tensor)


def _module_names(model: nn.Module) -> Iterable[str]:
    """Names of the model's modules as they are without adapters."""
    inside = tuple(f"{path}." for path in adapted_layers(model))
    return [canonical(path) for path, _ in model.named_modules() if path and not (inside and path.startswith(inside))]
