"""Attention in a whole model: the layers it will have once it is split, and where split ones stand.

A model with ``nn.MultiheadAttention`` is planned for as if each held four linear layers. Nothing is changed by looking.
"""

from __future__ import annotations

from collections.abc import Iterator

from torch import nn

from lightning_lora.model.layers import replace
from lightning_lora.nn.adapted import AdaptedLayer
from lightning_lora.nn.attention import PROJECTIONS, SplitAttention, why_not_splittable
from lightning_lora.nn.base import share_hooks

Host = AdaptedLayer | SplitAttention


def named_layers(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """Yield every module by name, each ``nn.MultiheadAttention`` with its projections as linear layers inside."""
    inside: set[nn.Module] = set()
    for name, module in model.named_modules():
        if module in inside:
            continue
        yield name, module
        if is_splittable(module):
            assert isinstance(module, nn.MultiheadAttention)
            inside.add(module.out_proj)
            for projection, layer in SplitAttention(module).named_children():
                yield f"{name}.{projection}" if name else projection, layer


def layer_at(model: nn.Module, path: str) -> nn.Module:
    """Return the layer that :func:`named_layers` has at ``path``; a projection is a view of the packed weight."""
    attention, name = attention_around(model, path), path.rpartition(".")[2]
    return model.get_submodule(path) if attention is None else SplitAttention(attention).get_submodule(name)


def attention_around(model: nn.Module, path: str) -> nn.MultiheadAttention | None:
    """Return the attention that has to be split before the layer at ``path`` is one, or None where it is one."""
    around, _, name = path.rpartition(".")
    if name not in PROJECTIONS:
        return None
    module = model.get_submodule(around)
    return module if isinstance(module, nn.MultiheadAttention) and is_splittable(module) else None


def place_of(model: nn.Module, path: str) -> str:
    """Return the name of what is replaced when the layer at ``path`` is adapted: itself, or the attention around it."""
    return path if attention_around(model, path) is None else path.rpartition(".")[0]


def is_splittable(module: nn.Module) -> bool:
    """Whether a module is an ``nn.MultiheadAttention`` as torch has it."""
    return isinstance(module, nn.MultiheadAttention) and why_not_splittable(module) is None


def hosts(model: nn.Module) -> dict[str, Host]:
    """What stands in the place of the model's own layers, by name; a split attention with all that is in it."""
    found: dict[str, Host] = {}
    inside: set[nn.Module] = set()
    for name, module in model.named_modules():
        if isinstance(module, SplitAttention) and any(isinstance(layer, AdaptedLayer) for layer in module.children()):
            found[name] = module
            inside |= set(module.children())
        elif isinstance(module, AdaptedLayer) and module not in inside:
            found[name] = module
    return found


def join_bare(model: nn.Module) -> None:
    """Put ``nn.MultiheadAttention`` back where no projection is adapted or quantized any more."""
    for module in list(model.modules()):
        if isinstance(module, SplitAttention) and all(type(layer) is nn.Linear for layer in module.children()):
            plain = module.joined()
            share_hooks(module, plain)
            replace(model, {module: plain})
