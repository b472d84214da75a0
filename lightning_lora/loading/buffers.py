"""Buffers that are in no file and lost their values on the meta device: computed again by the module's own code."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import Protocol, runtime_checkable

import torch
from torch import Tensor, nn

from lightning_lora.errors import LoadError, listing
from lightning_lora.nn.copied import copied


@runtime_checkable
class ResetsItself(Protocol):
    """A module that gives its tensors the values they have when it is built, as torch's own do."""

    def reset_parameters(self) -> None:
        """Write them in place."""


@runtime_checkable
class ResetsOthers(Protocol):
    """A model that does so for the modules in it, as those of Hugging Face transformers do."""

    def _init_weights(self, module: nn.Module) -> None:
        """Write the tensors that ``module`` itself holds, in place."""


def recomputed_buffers(model: nn.Module, names: Iterable[str]) -> dict[str, Tensor]:
    """Return the values of these buffers, on the CPU; the model is left as it is.

    A module's ``reset_parameters``, or ``_init_weights`` of a model around it, is called twice on a copy whose buffers
    hold different numbers first. What then is equal was computed; what is not was never written, or was drawn.

    Args:
        model: Its tensors may be on the meta device.
        names: Buffers of it.

    Raises:
        LoadError: Naming those that nothing computes.
    """
    found: dict[str, Tensor] = {}
    lost: list[str] = []
    for path, leaves in _by_module(names).items():
        module = model.get_submodule(path)
        values = next((made for reset in _resets(model, path) if (made := _computed(module, leaves, reset))), {})
        prefix = f"{path}." if path else ""
        found |= {f"{prefix}{leaf}": value for leaf, value in values.items()}
        lost += [f"{prefix}{leaf}" for leaf in leaves if leaf not in values]
    if lost:
        raise LoadError(
            f"{listing(lost)} is a buffer on the meta device that is not in the files, and nothing computes it again. "
            "Build the model with lightning_lora.parameters_on_meta() instead of torch.device('meta'): buffers then "
            "keep their values"
        )
    return found


def refuse_lost_attributes(model: nn.Module) -> None:
    """Raise ``LoadError`` if a module keeps a tensor on the meta device that is neither parameter nor buffer."""
    lost = [
        f"{path}.{name}" if path else name
        for path, module in model.named_modules()
        for name, value in vars(module).items()
        if isinstance(value, Tensor) and value.is_meta
    ]
    if lost:
        raise LoadError(
            f"{listing(lost)} is a tensor on the meta device that no file holds, for it is no parameter and no buffer. "
            "Build the model with lightning_lora.parameters_on_meta() instead of torch.device('meta')"
        )


def _by_module(names: Iterable[str]) -> dict[str, list[str]]:
    found: dict[str, list[str]] = {}
    for name in names:
        path, _, leaf = name.rpartition(".")
        found.setdefault(path, []).append(leaf)
    return found


def _resets(model: nn.Module, path: str) -> Iterator[Callable[[nn.Module], object]]:
    """What could write the buffers of the module at a path: itself, then the models around it from the inside out."""
    if isinstance(model.get_submodule(path), ResetsItself):
        yield lambda module: module.reset_parameters()  # type: ignore[operator]
    names = path.split(".") if path else []
    for count in range(len(names), -1, -1):
        around = model.get_submodule(".".join(names[:count]))
        if isinstance(around, ResetsOthers):
            yield around._init_weights


@torch.no_grad()
def _computed(module: nn.Module, leaves: list[str], reset: Callable[[nn.Module], object]) -> dict[str, Tensor]:
    """The buffers that ``reset`` gives the same values whatever they held before, and whatever is drawn."""
    try:
        with torch.random.fork_rng(devices=[]), torch.device("cpu"):
            first, second = (_after(module, leaves, reset, fill) for fill in (0, 1))
    except Exception:  # code that was not written to be called here; the buffers are refused by name
        return {}
    return {leaf: first[leaf] for leaf in leaves if torch.equal(first[leaf], second[leaf])}


def _after(module: nn.Module, leaves: list[str], reset: Callable[[nn.Module], object], fill: int) -> dict[str, Tensor]:
    made = copied(module).to("meta")  # so that nothing that is shared with the model can be written to
    for leaf in leaves:
        outline = made.get_buffer(leaf)
        setattr(made, leaf, torch.full(outline.shape, fill, dtype=outline.dtype, device="cpu"))
    reset(made)
    return {leaf: made.get_buffer(leaf) for leaf in leaves}
