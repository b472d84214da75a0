"""What an optimizer takes over from the ``torch.optim.Adam`` or ``AdamW`` in whose place it is put."""

from __future__ import annotations

from typing import Any, TypeVar

import torch
from torch.optim import Optimizer

from lightning_lora.errors import OptimizerError

Taker = TypeVar("Taker", bound=Optimizer)

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

FIX = "To keep your optimizer as it is, pass optimizer=None"
"""The way out of every refusal here."""


def replaceable(optimizer: Optimizer) -> bool:
    """Whether there are other forms of it: of exactly ``torch.optim.Adam`` and ``AdamW``, not of subclasses."""
    return type(optimizer) in (torch.optim.Adam, torch.optim.AdamW)


def groups_of(optimizer: Optimizer, taker: str) -> list[dict[str, Any]]:
    """Return the parameter groups, each with its lr, betas, eps, weight decay and whatever a scheduler has put there.

    Args:
        optimizer: A ``torch.optim.Adam`` or ``AdamW`` that has not stepped yet.
        taker: Who is going to have them, for people.

    Raises:
        OptimizerError: If the optimizer computes something that the taker cannot.
    """
    _refuse_differences(optimizer, taker)
    groups: list[dict[str, Any]] = []
    for group in optimizer.param_groups:
        kept = {key: value for key, value in group.items() if key not in _TORCH_ONLY}
        kept["lr"] = float(kept["lr"])
        groups.append({**kept, "params": list(group["params"])})
    return groups


def with_hooks_of(optimizer: Optimizer, taker: Taker) -> Taker:
    """Let ``taker`` run the hooks registered on ``optimizer``, and return it."""
    for hooks in _HOOKS:  # the same dicts, so that the handles which registering returned go on removing
        setattr(taker, hooks, getattr(optimizer, hooks))
    return taker


def optimizer_name(optimizer: Optimizer) -> str:
    """The class of one of torch's optimizers, as people write it."""
    return f"torch.optim.{type(optimizer).__name__}"


def _refuse_differences(optimizer: Optimizer, taker: str) -> None:
    for index, group in enumerate(optimizer.param_groups):
        for flag in ("amsgrad", "maximize", "differentiable"):
            if group.get(flag):
                raise OptimizerError(
                    f"{optimizer_name(optimizer)} has {flag}=True in group {index}, which {taker} cannot do. {FIX}"
                )
        if type(optimizer) is torch.optim.Adam and group["weight_decay"] and not group.get("decoupled_weight_decay"):
            raise OptimizerError(
                f"torch.optim.Adam adds its weight_decay={group['weight_decay']} (group {index}) to the gradient, "
                f"{taker} subtracts it from the weights. Use torch.optim.AdamW, or weight_decay=0. {FIX}"
            )
    if optimizer.state:
        raise OptimizerError(f"{optimizer_name(optimizer)} has stepped already; its moments would be lost. {FIX}")
