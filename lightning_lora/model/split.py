"""Modules that are taken apart to be adapted: the layers they will have, and where those taken apart stand.

A model with ``nn.MultiheadAttention`` is planned for as if each held four linear layers, and one with stacked experts
as if each stack were a layer. Nothing is changed by looking.
"""

from __future__ import annotations

from collections.abc import Iterator

from torch import nn

from lightning_lora.model.layers import replace
from lightning_lora.nn.adapted import AdaptedLayer
from lightning_lora.nn.adapter import Adapter
from lightning_lora.nn.attention import PROJECTIONS, SplitAttention, why_not_splittable
from lightning_lora.nn.base import QuantizedLinear, share_hooks
from lightning_lora.nn.experts import StackedWeight
from lightning_lora.nn.split import Split
from lightning_lora.nn.split_experts import SplitExperts, stacked_parameters

Host = AdaptedLayer | Split | QuantizedLinear
_OURS = (Split, Adapter, AdaptedLayer, StackedWeight, QuantizedLinear)


def named_layers(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """Yield every module by name, each that can be taken apart with the layers it will have inside."""
    inside: set[nn.Module] = set()
    for name, module in model.named_modules():
        if module in inside:
            continue
        yield name, module
        parts = part_names(module)
        inside |= {module.get_submodule(part) for part in parts if part in module._modules}
        if parts:
            split = taken_apart(module)
            yield from ((f"{name}.{part}" if name else part, split.get_submodule(part)) for part in parts)


def layer_at(model: nn.Module, path: str) -> nn.Module:
    """Return the layer that :func:`named_layers` has at ``path``; one that is not there yet is made for looking at."""
    around = module_around(model, path)
    return model.get_submodule(path) if around is None else taken_apart(around).get_submodule(path.rpartition(".")[2])


def module_around(model: nn.Module, path: str) -> nn.Module | None:
    """Return the module that has to be taken apart before there is a layer at ``path``, or None where there is one."""
    place, _, name = path.rpartition(".")
    module = model.get_submodule(place)
    return module if name in part_names(module) else None


def place_of(model: nn.Module, path: str) -> str:
    """Return the name of what is replaced when the layer at ``path`` is adapted: itself, or the module around it."""
    return path if module_around(model, path) is None else path.rpartition(".")[0]


def part_names(module: nn.Module) -> tuple[str, ...]:
    """Names of the layers a module has once it is taken apart; none where it cannot be."""
    if isinstance(module, nn.MultiheadAttention):
        return PROJECTIONS if why_not_splittable(module) is None else ()
    return () if isinstance(module, _OURS) else tuple(stacked_parameters(module))


def taken_apart(module: nn.Module) -> Split:
    """Return what can stand in the place of ``module``, which is left as it is."""
    return SplitAttention(module) if isinstance(module, nn.MultiheadAttention) else SplitExperts(module)


def hosts(model: nn.Module) -> dict[str, Host]:
    """What stands in the place of the model's own layers, by name; a module taken apart with all that is in it.

    That is adapted layers, and edges that were quantized without an adapter.
    """
    found: dict[str, Host] = {}
    inside: set[nn.Module] = set()
    for name, module in model.named_modules():
        if isinstance(module, Split) and any(isinstance(layer, AdaptedLayer) for layer in module.parts().values()):
            found[name] = module
            inside |= set(module.parts().values())
        elif isinstance(module, AdaptedLayer):
            inside.add(module.base_layer)
            if module not in inside:
                found[name] = module
        elif isinstance(module, QuantizedLinear) and module.edge and module not in inside:
            found[name] = module
    return found


def join_bare(model: nn.Module) -> None:
    """Put the original kind of module back where no part of it is adapted or quantized any more."""
    for module in list(model.modules()):
        if isinstance(module, Split) and all(type(x) in (nn.Linear, StackedWeight) for x in module.parts().values()):
            plain = module.joined()
            share_hooks(module, plain)
            replace(model, {module: plain})
