"""Which modules of a model are recomputed in the backward pass: blocks by name, or those that the model repeats."""

from __future__ import annotations

import difflib
from collections.abc import Iterable

from torch import nn

from lightning_lora.errors import TargetError, listing
from lightning_lora.model.targets import matches


def named_blocks(model: nn.Module, patterns: Iterable[str]) -> dict[str, nn.Module]:
    """Return the outermost modules whose names fit, a list's modules in the place of the list.

    Args:
        model: The model.
        patterns: Names, dotted suffixes or globs, as of targets: ``"layers"``, ``"encoder.layers.*"``.

    Raises:
        TargetError: If a pattern fits no module.
    """
    found: dict[str, nn.Module] = {}
    names = {name: module for name, module in model.named_modules() if name}
    for pattern in patterns:
        fitting = {name: module for name, module in names.items() if matches(name, pattern)}
        if not fitting:
            near = difflib.get_close_matches(pattern, names, n=3, cutoff=0.4)
            hint = f"; near it: {listing(near)}" if near else ""
            raise TargetError(f"activation_checkpointing={pattern!r} fits no module of {type(model).__name__}{hint}")
        found |= fitting
    outer = {name: module for name, module in found.items() if not any(_inside(name, other) for other in found)}
    return _without_lists(outer)


def repeated_blocks(model: nn.Module) -> dict[str, nn.Module]:
    """Return the blocks of the list (or sequence) of equal modules that holds most of the model, if there is one."""
    stacks = {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, (nn.ModuleList, nn.Sequential)) and _are_equal(list(module))
    }
    if not stacks:
        return {}
    name = max(stacks, key=lambda name: sum(p.numel() for p in stacks[name].parameters()))
    return {f"{name}.{child}" if name else child: block for child, block in stacks[name].named_children()}


def _are_equal(blocks: list[nn.Module]) -> bool:
    return (
        len(blocks) > 1 and len({type(block) for block in blocks}) == 1 and next(blocks[0].children(), None) is not None
    )


def _inside(name: str, other: str) -> bool:
    return name.startswith(f"{other}.")


def _without_lists(modules: dict[str, nn.Module]) -> dict[str, nn.Module]:
    found: dict[str, nn.Module] = {}
    for name, module in modules.items():
        if isinstance(module, (nn.ModuleList, nn.ModuleDict)):
            found |= _without_lists({f"{name}.{child}": block for child, block in module.named_children()})
        else:
            found[name] = module
    return found
