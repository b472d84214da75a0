"""Building a model whose parameters take no memory, and whose buffers hold what its code computes for them."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from torch import nn
from torch.nn.modules.module import register_module_parameter_registration_hook


@contextmanager
def parameters_on_meta() -> Iterator[None]:
    """Put the parameters of modules that are built within on the meta device, and leave their buffers as they are.

    Under ``torch.device("meta")`` buffers lose their values too, and those that are in no file (rotary frequencies,
    masks) would have to be computed again. Here only parameters do, at the moment a module takes them up: before they
    are initialized, so that this costs nothing. What a model ties stays tied.

    Example:
        >>> from torch import nn
        >>> with parameters_on_meta():
        ...     norm = nn.BatchNorm1d(2)
        >>> norm.weight.is_meta, norm.running_var
        (True, tensor([1., 1.]))
    """
    handle = register_module_parameter_registration_hook(_on_meta)  # type: ignore[arg-type]  # it may return one
    try:
        yield
    finally:
        handle.remove()


def _on_meta(module: nn.Module, name: str, parameter: nn.Parameter | None) -> nn.Parameter | None:
    """What takes the place of a parameter; None leaves it, so that one that stands in two places stays one."""
    if parameter is None or parameter.is_meta or nn.parameter.is_lazy(parameter):
        return None
    return nn.Parameter(parameter.detach().to("meta"), requires_grad=parameter.requires_grad)
