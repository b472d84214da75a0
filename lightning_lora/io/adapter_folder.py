"""The adapter folder: ``adapter_config.json`` and ``adapter_model.safetensors``, as PEFT reads and writes them."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from os import PathLike
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from lightning_lora.errors import AdapterError, listing
from lightning_lora.io import adapter_file, attention, biases, peft, readers, vera
from lightning_lora.io.adapter_file import AdapterFile
from lightning_lora.io.attention import PEFT_VERSION, is_packed
from lightning_lora.io.description import describe, describe_configs, storage, storage_in
from lightning_lora.io.experts import pack_stacks, stack_paths, unpacked_stacks
from lightning_lora.io.fingerprint import base_fingerprint, to_json
from lightning_lora.io.fitting import check_base, plan_for, require_free, require_same
from lightning_lora.io.keys import PREFIX, adapter_key, canonical, leaves, shape_on_disk, trained_key
from lightning_lora.io.model_card import write_card
from lightning_lora.io.notes import tell
from lightning_lora.model.biases import bias_of, trained_biases
from lightning_lora.model.inject import apply, check_name
from lightning_lora.model.layers import adapted_layers, require_adapters
from lightning_lora.model.merge import is_finite
from lightning_lora.model.parameters import (
    adapter_tensors,
    plain_adapters,
    trained_modules,
    trained_outside_adapters,
)
from lightning_lora.nn.adapted import AdaptedLayer
from lightning_lora.nn.adapter import Adapter, AdapterConfig
from lightning_lora.nn.conv import ConvKind
from lightning_lora.nn.kind import Kind
from lightning_lora.nn.linear import LinearKind


def save_adapter(
    model: nn.Module, path: str | PathLike[str], name: str = "default", *, model_card: bool = False
) -> None:
    """Write adapter ``name`` and the modules trained along with it to a folder that PEFT can load.

    Layers are named as in ``model``: pass the module you will load the adapter into. Each file is complete or absent,
    and a reader of ours notices if the two are from different saves, if a byte of a tensor has changed, and if the
    adapter is loaded over other base weights. An adapter that started in the base weight (PiSSA, OLoRA, LoftQ) is
    written as the plain LoRA of twice its rank that makes the same change to the original base. What other programs
    that serve adapters (vLLM, llama.cpp) cannot take of it is logged, in a line for each.

    Args:
        model: A model with adapters.
        path: The folder; made if it is not there.
        name: Which adapter.
        model_card: Whether to write a ``README.md`` too, that says what the adapter is and how to load it. One that
            somebody else has written stays.

    Raises:
        AdapterError: If there is no such adapter, if it holds NaN, or if the format cannot hold it.
        OSError: If the folder cannot be written; an adapter that was there before is untouched.
    """
    layers, configs, settings = _outline(model, name)
    tensors = adapter_state_dict(model, name)
    broken = [key for key, tensor in tensors.items() if not is_finite(tensor)]
    if broken:
        raise AdapterError(
            f"NaN or infinity in {listing(broken)}; not written. The training diverged: go back to an earlier "
            "checkpoint"
        )
    metadata = (
        describe(model, name)
        | describe_configs(configs)
        | {
            "dropout": peft.dropout_in(settings),
            "base_fingerprint": to_json(base_fingerprint({canonical(path): layer for path, layer in layers.items()})),
        }
    )
    adapter_file.write(Path(path), tensors, settings, metadata)
    if model_card:
        origin = getattr(getattr(model, "config", None), "_name_or_path", None)  # as Hugging Face's models keep it
        write_card(Path(path), metadata, type(model).__name__, origin or None)
    for line in readers.limits(settings, tensors):
        tell(f"{path}: {line}")


def check_savable(model: nn.Module, name: str = "default") -> None:
    """Raise ``AdapterError`` if :func:`save_adapter` would, whatever values training gives the tensors."""
    _outline(model, name)
    adapter_state_dict(model, name)


def adapter_state_dict(model: nn.Module, name: str = "default") -> dict[str, Tensor]:
    """Return the tensors of adapter ``name``, and of modules trained along with it, by their on-disk names.

    Raises:
        AdapterError: If there is no such adapter, or a parameter is trained that belongs neither to it nor to a whole
            trained module.
    """
    found: dict[str, Tensor] = {}
    adapters, layers = plain_adapters(model, name), adapter_tensors(model, name)
    configs = {canonical(path): adapter.config for path, adapter in adapters.items()}
    attention.pack_configs(model, configs)  # refuses what the format cannot say of an attention
    stacks = stack_paths(model)
    for path, tensors in layers.items():
        if not is_packed(model, path) and canonical(path) not in stacks:
            found |= _on_disk(path, adapters[path].kind, adapters[path].config.method, tensors)
    by_name = {canonical(path): tensors for path, tensors in layers.items()}
    for path, tensors in (attention.pack_tensors(model, by_name) | pack_stacks(model, by_name)).items():
        found |= {adapter_key(path, leaf): tensor for leaf, tensor in tensors.items()}
    found |= vera.pack_tensors(model, configs, layers)
    whole = trained_modules(model, name)
    held = {id(parameter) for module in whole for parameter in model.get_submodule(module).parameters()}
    held |= {id(bias_of(model.get_submodule(path))) for path in trained_biases(model, name)}
    stray = [path for path in trained_outside_adapters(model) if id(model.get_parameter(path)) not in held]
    if stray:
        raise AdapterError(
            f"{listing(stray)} is trained but part of no adapter, so an adapter folder cannot hold it. Name its module "
            "in train="
        )
    found |= biases.bias_tensors(model, name)
    for module in whole:
        state = model.get_submodule(module).state_dict()
        found |= {trained_key(f"{module}.{key}"): tensor.detach() for key, tensor in state.items()}
    return found


def load_adapter(
    model: nn.Module, path: str | PathLike[str], name: str | None = None, *, allow_base_mismatch: bool = False
) -> nn.Module:
    """Load an adapter folder, ours or PEFT's, into ``model``, in place, and return the model.

    The adapter is injected if the model has none of that name, with the rank, scaling and targets of the file;
    otherwise it has to match the one that is there. Everything is checked before anything changes: the files, the
    header against the model, the base model against the fingerprint in the header, and only then the tensors, which
    have to be those that were written. What a file by another program cannot say is not checked, and logged.

    Args:
        model: The base model the adapter was trained on, plain or with adapters.
        path: The folder.
        name: What to call the adapter here; None means ``"default"``.
        allow_base_mismatch: Whether to load it over weights that are not those it was trained on, e.g. a newer base.

    Raises:
        AdapterError: If the folder is not there, damaged, a pickle, or does not fit the model or its weights; the
            message names the file and the key.
        TargetError: If a layer of the model cannot be adapted.
    """
    name = "default" if name is None else name
    check_name(name)
    folder = Path(path)
    try:
        outline = adapter_file.read(folder)
        file = as_here(model, outline)
        check_base(model, plan_for(model, file), file, folder, allow_mismatch=allow_base_mismatch)
        file = as_here(model, adapter_file.load(folder, outline))
        plan = plan_for(model, file)  # again: without our header, some of it is known from the values alone
        require_free(model, file, name)
        if any(name in layer.adapters for layer in adapted_layers(model).values()):
            require_same(model, plan, name)
        else:
            apply(model, plan, name=name)
    except AdapterError as error:
        raise AdapterError(f"{folder}: {error}") from None
    _fill(model, file, name)
    return model


def as_here(model: nn.Module, file: AdapterFile) -> AdapterFile:
    """Return a file as it was read with everything in it as it is here, rather than in PEFT.

    Raises:
        AdapterError: If something in it has no place in the model.
    """
    file = unpacked_stacks(model, attention.unpacked(model, file))
    return biases.separated(model, vera.unpacked(model, file))


def _outline(model: nn.Module, name: str) -> tuple[dict[str, AdaptedLayer], dict[str, AdapterConfig], dict[str, Any]]:
    """The layers an adapter is on, their configs as they are saved, and PEFT's config of them all."""
    layers = {path: layer for path, layer in require_adapters(model, name).items() if name in layer.adapters}
    configs = {canonical(path): adapter.config for path, adapter in plain_adapters(model, name).items()}
    settings = peft.to_peft(
        vera.pack_configs(model, attention.pack_configs(model, configs)),
        names=_module_names(model),
        parameters=stack_paths(model),
        train=map(canonical, trained_modules(model, name)),
        bias=biases.choice_of(model, name),
        transposed=any(isinstance(layer.kind, LinearKind) and layer.kind.transposed for layer in layers.values()),
    )
    if any(is_packed(model, path) for path in layers):
        settings["peft_version"] = PEFT_VERSION
    return layers, configs, settings


@torch.no_grad()
def fill(adapter: Adapter, kind: Kind, tensors: Mapping[str, Tensor]) -> None:
    """Copy an adapter's tensors, by their on-disk names, into it."""
    names = leaves(kind, adapter.config.method)
    for key, parameter in adapter.named_parameters():
        parameter.copy_(tensors[names[key]].reshape(parameter.shape))


def _on_disk(path: str, kind: Kind, method: str, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    if isinstance(kind, ConvKind) and kind.groups > 1:
        raise AdapterError(
            f"{path} is a convolution in {kind.groups} groups. PEFT's adapter on such a layer is another function "
            "(every group sees all channels), so its format cannot hold this one. merge(model) and save the model"
        )
    names = leaves(kind, method)
    rank = len(tensors["vera_lambda_d" if method == "vera" else "lora_A"])
    return {
        adapter_key(path, leaf): tensors[key].reshape(shape_on_disk(kind, key, rank)) for key, leaf in names.items()
    }


@torch.no_grad()
def _fill(model: nn.Module, file: AdapterFile, name: str) -> None:
    for path, layer in adapted_layers(model).items():
        if name in layer.adapters:
            adapter, stored = layer.adapter(name), storage_in(file.metadata, canonical(path))
            adapter.trained_over = None if stored == storage(layer.base_layer) else stored
            fill(adapter, layer.kind, file.adapters[canonical(path)])
    state = {canonical(key): tensor for key, tensor in model.state_dict().items()}
    for key, tensor in file.others.items():
        state[key.removeprefix(PREFIX)].copy_(tensor)
    live = {canonical(path): path for path in trained_biases(model, name)}
    for path, tensor in file.biases.items():
        bias = bias_of(model.get_submodule(live[path]))
        assert bias is not None
        bias.copy_(tensor)


def _module_names(model: nn.Module) -> Iterable[str]:
    """Names of the model's modules as they are without adapters."""
    inside = tuple(f"{path}." for path in adapted_layers(model))
    own = [path for path, _ in model.named_modules() if path and not (inside and path.startswith(inside))]
    whole = [canonical(path) for path in own if not is_packed(model, path) or path.endswith(".out_proj")]
    return {path.replace(".base_module", "") for path in whole} - set(stack_paths(model))
