"""The parameters of an adapted model: which are trained, and what to save of them."""

from __future__ import annotations

from collections.abc import Iterator

from torch import Tensor, nn

from lightning_lora.model.biases import bias_of, trained_biases
from lightning_lora.model.layers import require_adapters
from lightning_lora.nn.adapter import Adapter

_TRAINED_WITH = "_lora_trained_with"


def adapter_parameters(model: nn.Module) -> Iterator[nn.Parameter]:
    """Yield the trainable parameters of the active adapters, in the model's order.

    Raises:
        AdapterError: If the model has no adapters.
    """
    for layer in require_adapters(model).values():
        for name in layer.active:
            yield from (p for p in layer.adapter(name).parameters() if p.requires_grad)


def up_parameters(model: nn.Module) -> Iterator[nn.Parameter]:
    """Yield the factors ``B`` of every adapter, active or not."""
    for layer in require_adapters(model).values():
        for adapter in map(layer.adapter, layer.adapters):
            yield from (adapter.get_parameter(name) for name in adapter.up)


def adapter_state_keys(model: nn.Module, name: str = "default") -> list[str]:
    """Names, in ``model.state_dict()``, of all that a fine-tune changes.

    That is adapter ``name``, other trained parameters, and the buffers (running statistics) of modules trained whole.
    """
    adapters = tuple(f"{path}.adapters.{name}." for path in require_adapters(model, name))
    trained = set(trained_outside_adapters(model))
    whole = tuple(f"{path}." for path in trained_modules(model, name))
    biases = {id(bias_of(model.get_submodule(path))) for path in trained_biases(model, name)}
    trained |= {key for key, p in model.named_parameters(remove_duplicate=False) if id(p) in biases}
    return [key for key in model.state_dict() if key.startswith(adapters + whole) or key in trained]


def trained_outside_adapters(model: nn.Module) -> list[str]:
    """Names of the trained parameters that belong to no adapter, under whichever name the model has it."""
    inside = {id(p) for layer in require_adapters(model).values() for p in layer.adapters.parameters()}
    parameters = model.named_parameters(remove_duplicate=False)
    return [name for name, parameter in parameters if parameter.requires_grad and id(parameter) not in inside]


def trained_modules(model: nn.Module, name: str = "default") -> list[str]:
    """Names of the modules trained whole along with adapter ``name``, also when they have been frozen since."""
    return [path for path, module in model.named_modules() if path and name in vars(module).get(_TRAINED_WITH, ())]


def mark_trained(module: nn.Module, name: str) -> None:
    """Note on a module that it is trained whole along with adapter ``name``, so that it is saved along.

    Whether its parameters require gradients would not tell: a model is often frozen before it is saved.
    """
    vars(module)[_TRAINED_WITH] = (*vars(module).get(_TRAINED_WITH, ()), name)


def unmark_trained(model: nn.Module, *names: str) -> None:
    """Take the notes of these adapters back."""
    for module in model.modules():
        left = tuple(name for name in vars(module).pop(_TRAINED_WITH, ()) if name not in names)
        if left:
            vars(module)[_TRAINED_WITH] = left


def adapter_tensors(model: nn.Module, name: str = "default") -> dict[str, dict[str, Tensor]]:
    """The tensors of adapter ``name``, as it is over the original base, by layer and then by their name in it."""
    return {path: dict(adapter.state_dict()) for path, adapter in plain_adapters(model, name).items()}


def plain_adapters(model: nn.Module, name: str = "default") -> dict[str, Adapter]:
    """Adapter ``name`` by layer, as it is over the original base: see :meth:`Adapter.plain`."""
    layers = require_adapters(model, name)
    return {path: layer.adapter(name).plain() for path, layer in layers.items() if name in layer.adapters}
