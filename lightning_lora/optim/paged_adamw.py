"""The paged 8-bit AdamW in the place of ``torch.optim.Adam`` and ``AdamW``."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from lightning_lora.errors import OptimizerError
from lightning_lora.optim.flat_adamw import FlatPagedAdamW8bit

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

_HOOKS = (
    "_optimizer_step_pre_hooks",
    "_optimizer_step_post_hooks",
    "_optimizer_state_dict_pre_hooks",
    "_optimizer_state_dict_post_hooks",
    "_optimizer_load_state_dict_pre_hooks",
    "_optimizer_load_state_dict_post_hooks",
)
"""Where torch keeps what ``register_step_pre_hook`` and its like were given."""


def replaceable(optimizer: Optimizer) -> bool:
    """Whether there is a paged 8-bit form: for exactly ``torch.optim.Adam`` and ``AdamW``, not for subclasses."""
    return type(optimizer) in (torch.optim.Adam, torch.optim.AdamW)


def paged_adamw_8bit(optimizer: Optimizer, names: Mapping[Tensor, str] | None = None) -> FlatPagedAdamW8bit:
    """Return a paged 8-bit AdamW over the same parameter groups.

    Each group keeps its lr, betas, eps, weight decay and whatever a scheduler has put there, and the optimizer the
    hooks registered on it.

    Args:
        optimizer: A ``torch.optim.Adam`` or ``AdamW`` that has not stepped yet.
        names: Names of the parameters, under which their moments are saved.

    Raises:
        OptimizerError: If the optimizer computes something the 8-bit one cannot.
    """
    _refuse_differences(optimizer)
    groups: list[dict[str, Any]] = []
    for group in optimizer.param_groups:
        kept = {key: value for key, value in group.items() if key not in _TORCH_ONLY}
        kept["lr"] = float(kept["lr"])
        groups.append({**kept, "params": list(group["params"])})
    swapped = FlatPagedAdamW8bit(groups, names=names)
    for hooks in _HOOKS:  # the same dicts, so that the handles which registering returned go on removing
        setattr(swapped, hooks, getattr(optimizer, hooks))
    return swapped


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
