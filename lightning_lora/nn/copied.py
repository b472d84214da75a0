"""A module of its own that holds another's very tensors, so that they can be changed for others in it alone."""

from __future__ import annotations

import copy

from torch import nn


def copied(module: nn.Module) -> nn.Module:
    """Return a module of its own that holds the same tensors, as do the modules in it."""
    made = copy.copy(module)  # which shares these dicts
    made._parameters, made._buffers = dict(module._parameters), dict(module._buffers)
    made._modules = {name: child if child is None else copied(child) for name, child in module._modules.items()}
    return made
