"""The closure that ``optimizer.step`` may be given, as Lightning gives one under automatic optimization."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch


def evaluated(closure: Callable[[], Any] | None) -> Any:
    """Compute the loss and the gradients anew, within a ``step`` that takes no gradients, and return the loss."""
    if closure is None:
        return None
    with torch.enable_grad():
        return closure()
