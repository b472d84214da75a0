"""Copies of models and batches that have shapes, dtypes and modules, and neither values nor memory."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map_only


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


def hollow_model(model: nn.Module, dtype: torch.dtype | None) -> nn.Module:
    """Return a copy whose parameters and buffers are hollow; what they share stays shared.

    Args:
        model: Stays as it is.
        dtype: Of parameters and buffers of floating point; None keeps theirs.
    """
    made: dict[int, Any] = {}
    for parameter in model.parameters():
        made[id(parameter)] = nn.Parameter(hollow_tensor(parameter, dtype), requires_grad=parameter.requires_grad)
    for buffer in model.buffers():
        made[id(buffer)] = hollow_tensor(buffer, dtype)
    return copy.deepcopy(model, made)
