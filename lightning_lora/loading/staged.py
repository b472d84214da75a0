"""What has been read and packed, kept aside until everything has: a model is loaded whole or stays as it was."""

from __future__ import annotations

from torch import Tensor, nn

from lightning_lora.model.layers import replace
from lightning_lora.nn.base import hand_over_hooks


class Staged:
    """Tensors by the names they will have, and modules by those they will replace."""

    def __init__(self) -> None:
        self._tensors: dict[tuple[str, ...], Tensor] = {}
        self._modules: dict[nn.Module, nn.Module] = {}

    def tensor(self, names: tuple[str, ...], value: Tensor) -> None:
        """Put one tensor under all of these names."""
        self._tensors[names] = value

    def module(self, old: nn.Module, new: nn.Module) -> None:
        """Put a module wherever the old one stands."""
        self._modules[old] = new

    def install(self, model: nn.Module) -> None:
        """Change the model."""
        for names, value in self._tensors.items():
            put_tensor(model, names, value)
        for old, new in self._modules.items():
            hand_over_hooks(old, new)
        replace(model, self._modules)


def put_tensor(model: nn.Module, names: tuple[str, ...], value: Tensor) -> None:
    """Put one parameter or buffer in the places of those called so, which stay tied."""
    new: Tensor = value
    for name in names:
        path, _, leaf = name.rpartition(".")
        holder = model.get_submodule(path)
        old = dict(holder.named_parameters(recurse=False)).get(leaf)
        if old is not None and new is value:
            new = nn.Parameter(value, requires_grad=old.requires_grad)
            vars(new).update(vars(old))  # what users note on a parameter, such as that it is not to be decayed
        setattr(holder, leaf, new)
