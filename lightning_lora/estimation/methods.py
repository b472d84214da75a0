"""How a hollow model is set up for each method, and which of its parameters are trained at a time."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import nn

from lightning_lora.errors import TargetError, listing
from lightning_lora.estimation.setup import Setup
from lightning_lora.model.blocks import repeated_blocks
from lightning_lora.model.dequantized import keep_dequantized
from lightning_lora.model.inject import apply
from lightning_lora.model.targets import resolve, resolve_train
from lightning_lora.optim.badam import BAdam, blocks_of
from lightning_lora.quantization.blank import quantize_blank, start_blank

_LAST = 2
"""Blocks that ``method="freeze"`` trains where no module is named."""


def prepare(model: nn.Module, setup: Setup) -> list[str]:
    """Make ``model`` what is trained, in place.

    Returns:
        What has to be known of it: layers that stay as they are.

    Raises:
        QuantizationError: If no layer can be stored as the setup says.
        TargetError: If a pattern does not fit the model.
    """
    if setup.has_adapters:
        return _adapt(model, setup)
    if setup.method == "freeze":
        return _freeze(model, setup)
    for parameter in model.parameters():
        parameter.requires_grad_(parameter.is_floating_point())
    return []


def trained_at_once(model: nn.Module, setup: Setup) -> list[list[nn.Parameter]]:
    """Return the sets of parameters that are trained at a time, of those that take equally much the first.

    That is one set of all, but for BAdam, whose blocks take turns. The first block of a size is the one that gradients
    pass most of the model to.
    """
    if not isinstance(setup.update_rule, BAdam):
        return [list(trained_parameters(model).values())]
    blocks: dict[int, list[nn.Parameter]] = {}
    for block in blocks_of(model).values():
        blocks.setdefault(sum(p.numel() for p in block), block)
    return list(blocks.values())


def trained_parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    """The parameters that require a gradient, by name."""
    return {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}


def _adapt(model: nn.Module, setup: Setup) -> list[str]:
    """Inject, and put layers of the storage's size under the adapters."""
    plan = resolve(
        model, setup.targets, setup.adapters, exclude=setup.exclude, train=setup.train, train_bias=setup.train_bias
    )
    apply(model, plan, start=False)
    notes = _note("left as they are", plan.left)
    if setup.storage is not None:
        kept = quantize_blank(model, setup.storage, torch.device(setup.device), embeddings=setup.embeddings)
        notes += _note("not quantized", kept)
        keep_dequantized(model, setup.dequantized_cache)
    start_blank(model)
    return notes


def _freeze(model: nn.Module, setup: Setup) -> list[str]:
    """Freeze all but what ``train`` names, or the last blocks."""
    names = resolve_train(model, setup.train) or tuple(repeated_blocks(model))[-_LAST:]
    if not names:
        raise TargetError(
            f"method='freeze' looks for the blocks a model repeats, and {type(model).__name__} has no list of equal "
            "modules. Name what is trained: method='freeze', train=(...)"
        )
    model.requires_grad_(False)
    for name in names:
        model.get_submodule(name).requires_grad_(True)
    return [f"trained: {listing(names)}"]


def _note(what: str, layers: Mapping[str, str]) -> list[str]:
    return [f"{what}: {listing(f'{name} ({why})' for name, why in layers.items())}"] if layers else []
