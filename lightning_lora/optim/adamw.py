"""AdamW's state and arithmetic for one tensor, as torch has them: what other optimizers of ours are built around."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from torch.optim.adamw import adamw


def fresh_moments(like: Tensor) -> dict[str, Tensor]:
    """Return the state before the first step: two moments of a tensor's shape and dtype, and how many steps."""
    return {"step": torch.zeros(()), "exp_avg": torch.zeros_like(like), "exp_avg_sq": torch.zeros_like(like)}


def update(weight: Tensor, gradient: Tensor, state: Mapping[str, Tensor], group: Mapping[str, Any]) -> None:
    """Do one step of ``torch.optim.AdamW`` on ``weight``, in place.

    Args:
        weight: What is updated.
        gradient: Its gradient, of the same shape and dtype.
        state: From :func:`fresh_moments`.
        group: ``lr``, ``betas``, ``eps`` and ``weight_decay``.
    """
    beta1, beta2 = group["betas"]
    adamw(
        [weight], [gradient], [state["exp_avg"]], [state["exp_avg_sq"]], [], [state["step"]], foreach=False,
        amsgrad=False, beta1=beta1, beta2=beta2, lr=group["lr"], weight_decay=group["weight_decay"], eps=group["eps"],
        maximize=False,
    )  # fmt: skip
