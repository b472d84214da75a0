"""Adapters on stacked weights of experts, in PEFT's format (``target_parameters``) and out of it.

PEFT keeps the factors of all experts in two matrices, and wraps a module once for each of its parameters, the first
innermost. On disk that is

    <module>.base_layer.lora_A.weight   (E R, I)   of the first of two parameters, one expert below the other
    <module>.base_layer.lora_B.weight   (O, R E)   with neighbouring columns of one rank and all experts
    <module>.lora_A.weight, .lora_B.weight         of the last
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

from torch import Tensor, nn

from lightning_lora.errors import AdapterError, listing
from lightning_lora.io import peft
from lightning_lora.io.adapter_file import AdapterFile
from lightning_lora.io.keys import canonical
from lightning_lora.model.split import part_names
from lightning_lora.nn.split_experts import SplitExperts, stacked_parameters

_LEVEL = ".base_layer"
_A, _B = "lora_A.weight", "lora_B.weight"


def stack_paths(model: nn.Module) -> list[str]:
    """Names of the stacked parameters of modules that are taken apart, in the order of their registration."""
    return [f"{path}.{name}" for path, split in _taken_apart(model).items() for name in split.parts()]


def pack_stacks(model: nn.Module, tensors: Mapping[str, Mapping[str, Tensor]]) -> dict[str, dict[str, Tensor]]:
    """Return the tensors of adapters on experts by PEFT's layers, and by their on-disk names in them.

    Args:
        model: The model the adapters are in.
        tensors: ``lora_A`` and ``lora_B`` of each adapted layer, by its canonical name.
    """
    packed = {}
    for path, split in _taken_apart(model).items():
        held = [name for name in split.parts() if f"{path}.{name}" in tensors]
        for level, name in zip(reversed(range(len(held))), held, strict=True):
            lora_A, lora_B = (tensors[f"{path}.{name}"][key] for key in ("lora_A", "lora_B"))
            packed[path + level * _LEVEL] = {_A: lora_A.flatten(0, 1), _B: lora_B.permute(1, 2, 0).flatten(1)}
    return packed


def unpacked_stacks(model: nn.Module, file: AdapterFile) -> AdapterFile:
    """Return a file with the adapters on experts as if they were on layers, which they are here.

    Raises:
        AdapterError: If it names parameters that are no stacks of experts here, or their tensors do not fit.
    """
    targets = file.settings.get("target_parameters")
    if not targets:
        return file
    if not isinstance(targets, list) or not all(isinstance(target, str) for target in targets):
        raise AdapterError(f"target_parameters is {targets!r}, expected a list of names")
    stacks = _stacks(model)
    unknown = [target for target in targets if not any(peft.fits(path, [target]) for path in stacks)]
    if unknown:
        raise AdapterError(f"target_parameters names {listing(unknown)}, and no stack of experts here is called so")
    adapters = dict(file.adapters)
    found = []
    for path in dict.fromkeys(path.rpartition(".")[0] for path in stacks):
        named = [p for p in stacks if p.rpartition(".")[0] == path and peft.fits(p, targets)]
        for level, stack in zip(reversed(range(len(named))), named, strict=True):
            adapters[stack] = _unpacked(path + level * _LEVEL, adapters, stacks[stack])
            found.append(stack)
    modules = file.settings.get("target_modules")
    if modules is None or isinstance(modules, list):  # else an expression, which nothing is checked against
        modules = [*(modules or ()), *found]
    settings = {**file.settings, "target_parameters": None, "target_modules": modules}
    return replace(file, settings=settings, adapters=adapters)


def refuse_stacks(file: AdapterFile) -> None:
    """Refuse what cannot be told without the model: which tensors are whose, and how many experts there are.

    Raises:
        AdapterError: If the file holds adapters on stacks of experts.
    """
    if file.settings.get("target_parameters"):
        raise AdapterError(
            "it holds adapters on stacks of experts (target_parameters), which are told apart by the model alone. "
            "load_adapter(model, folder) reads and checks them, export_merged(model, folder) then writes the merged "
            "model"
        )


def _unpacked(key: str, adapters: dict[str, Mapping[str, Tensor]], experts: int) -> dict[str, Tensor]:
    """Take the factors of one stack out of the file, as ``(E, R, I)`` and ``(E, O, R)``."""
    pair = adapters.pop(key, {})
    missing = [f"{key}.{leaf}" for leaf in (_A, _B) if leaf not in pair]
    if missing:
        raise AdapterError(f"{listing(missing)} is missing, which target_parameters calls for")
    lora_A, lora_B = pair[_A], pair[_B]
    if lora_A.dim() != 2 or lora_B.dim() != 2 or len(lora_A) % experts or lora_B.shape[1] % experts:
        raise AdapterError(
            f"{key} has factors of shapes {tuple(lora_A.shape)} and {tuple(lora_B.shape)}, which are not those of "
            f"{experts} experts"
        )
    into, out = lora_A.shape[1], lora_B.shape[0]
    return {_A: lora_A.reshape(experts, -1, into), _B: lora_B.reshape(out, -1, experts).permute(2, 0, 1)}


def _stacks(model: nn.Module) -> dict[str, int]:
    """Every stack of experts by its name, taken apart or not, with the number of experts."""
    found: dict[str, int] = {}
    for path, module in model.named_modules():
        if isinstance(module, SplitExperts):
            found |= {f"{canonical(path)}.{name}": module.experts_in(name) for name in module.parts()}
        elif not isinstance(module, nn.MultiheadAttention) and part_names(module):
            found |= {f"{canonical(path)}.{name}": len(p) for name, p in stacked_parameters(module).items()}
    return found


def _taken_apart(model: nn.Module) -> dict[str, SplitExperts]:
    return {canonical(path): module for path, module in model.named_modules() if isinstance(module, SplitExperts)}
