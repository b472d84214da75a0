"""Copies of models and batches that have shapes, dtypes and modules, and neither values nor memory."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map_only

from lightning_lora.model.layers import adapted_layers


def hollow_tensor(tensor: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    """Return a tensor of the same shape on the CPU; within a ``FakeTensorMode`` it takes no memory.

    Args:
        tensor: On any device, the meta device included.
        dtype: Of the result where ``tensor`` is of floating point.
    """
    kind = dtype if dtype is not None and tensor.is_floating_point() else tensor.dtype
    return torch.empty_strided(tensor.shape, tensor.stride(), dtype=kind, device="cpu")


def hollow_batch(batch: Any) -> Any:
    """Return the same nest of containers with hollow tensors."""
    return tree_map_only(Tensor, hollow_tensor, batch)


def hollow_model(model: nn.Module, dtype: torch.dtype | None = None, *, shared: Sequence[object] = ()) -> nn.Module:
    """Return a copy whose parameters and buffers are hollow; what they share stays shared.

    Args:
        model: Stays as it is.
        dtype: Of parameters and buffers of floating point outside of adapters, which keep theirs; None keeps all.
        shared: What it refers to and is not to be copied.
    """
    kept = {id(tensor) for layer in adapted_layers(model).values() for tensor in _tensors(layer.adapters)}
    made: dict[int, Any] = {id(item): item for item in shared}
    for parameter in model.parameters():
        made[id(parameter)] = nn.Parameter(
            hollow_tensor(parameter, None if id(parameter) in kept else dtype), requires_grad=parameter.requires_grad
        )
    for buffer in model.buffers():
        made[id(buffer)] = hollow_tensor(buffer, None if id(buffer) in kept else dtype)
    return copy.deepcopy(model, made)


def _tensors(module: nn.Module) -> Iterator[Tensor]:
    yield from module.parameters()
    yield from module.buffers()
