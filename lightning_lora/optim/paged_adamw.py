"""bitsandbytes' paged 8-bit AdamW in the place of ``torch.optim.Adam`` and ``AdamW``."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from lightning_lora import dependencies
from lightning_lora.errors import OptimizerError
from lightning_lora.optim.report import MIN_PAGED

_TORCH_ONLY = {
    "foreach",
    "fused",
    "capturable",
    "differentiable",
    "amsgrad",
    "maximize",
    "decoupled_weight_decay",
    "params",
}


def replaceable(optimizer: Optimizer) -> bool:
    """Whether there is a paged 8-bit form: for exactly ``torch.optim.Adam`` and ``AdamW``, not for subclasses."""
    return type(optimizer) in (torch.optim.Adam, torch.optim.AdamW)


def paged_adamw_8bit(optimizer: Optimizer) -> Optimizer:
    """Return a ``bitsandbytes.optim.PagedAdamW8bit`` over the same parameter groups.

    Each group keeps its lr, betas, eps, weight decay and whatever a scheduler has put there. Moments are kept in 8 bits
    for parameters of at least 4096 elements and in 32 bits for smaller ones; see :mod:`lightning_lora.optim.report`.

    Args:
        optimizer: A ``torch.optim.Adam`` or ``AdamW`` that has not stepped yet.

    Raises:
        OptimizerError: If the optimizer computes something the 8-bit one cannot.
    """
    _refuse_differences(optimizer)
    bnb = dependencies.bitsandbytes("optimizer='paged_adamw_8bit'")
    groups: list[dict[str, Any]] = []
    for group in optimizer.param_groups:
        kept = {key: value for key, value in group.items() if key not in _TORCH_ONLY}
        kept["lr"] = float(kept["lr"])
        groups.append({**kept, "params": list(group["params"])})
    swapped = bnb.optim.PagedAdamW8bit(groups)
    assert isinstance(swapped, Optimizer)
    # bitsandbytes would warn at the first step that it does not page on the CPU; the optimizer report says so
    # beforehand.
    swapped._cpu_paged_warned = True  # type: ignore[attr-defined]
    return swapped


def page_again(optimizer: Optimizer) -> None:
    """Put moments back into paged memory that were loaded from a checkpoint.

    ``load_state_dict`` makes ordinary CUDA tensors of them, and the GPU could no longer evict them to the host.
    """
    if not getattr(optimizer, "is_paged", False):
        return
    for parameter, state in optimizer.state.items():
        if not parameter.is_cuda or parameter.numel() < MIN_PAGED:
            continue
        for key in ("state1", "state2"):
            moments = state.get(key)
            if isinstance(moments, Tensor) and not getattr(moments, "is_paged", False):
                buffer = optimizer.get_state_buffer(parameter, dtype=moments.dtype)  # type: ignore[attr-defined]
                buffer.copy_(moments)
                state[key] = buffer


def _refuse_differences(optimizer: Optimizer) -> None:
    for index, group in enumerate(optimizer.param_groups):
        for flag in ("amsgrad", "maximize", "differentiable"):
            if group.get(flag):
                raise OptimizerError(
                    f"{optimizer_name(optimizer)} has {flag}=True in group {index}, which the paged 8-bit AdamW "
                    f"cannot do. {FIX}"
                )
        if type(optimizer) is torch.optim.Adam and group["weight_decay"] and not group.get("decoupled_weight_decay"):
            raise OptimizerError(
                f"torch.optim.Adam adds its weight_decay={group['weight_decay']} (group {index}) to the gradient, the "
                f"paged 8-bit AdamW subtracts it from the weights. Use torch.optim.AdamW, or weight_decay=0. {FIX}"
            )
    if optimizer.state:
        raise OptimizerError(f"{optimizer_name(optimizer)} has stepped already; its moments would be lost. {FIX}")


FIX = "To keep your optimizer as it is, pass optimizer=None"
"""The way out of every refusal here."""


def optimizer_name(optimizer: Optimizer) -> str:
    """The class of one of torch's optimizers, as people write it."""
    return f"torch.optim.{type(optimizer).__name__}"
