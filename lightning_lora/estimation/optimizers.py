"""What an optimizer keeps for each parameter, and what it needs while it makes a step. Counted, not run."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence

import torch
from torch import Tensor

from lightning_lora.optim.moments import Moments, padded
from lightning_lora.optim.runs import joining

Counter = Callable[[Sequence[Tensor]], int]


def paged_adamw_8bit(parameters: Sequence[Tensor]) -> int:
    """Bytes of :class:`lightning_lora.optim.flat_adamw.FlatPagedAdamW8bit`: small parameters are in 32 bits.

    Args:
        parameters: What it trains.
    """
    buffers = ((padded(p.numel()), each) for p in parameters for each in Moments.of(p).per_element.values())
    return sum(elements // per * dtype.itemsize for elements, (per, dtype) in buffers)


def adamw(parameters: Sequence[Tensor]) -> int:
    """Bytes of ``torch.optim.AdamW``: two moments in the parameter's dtype, and a ``float32`` that counts the steps."""
    return sum(2 * p.numel() * p.element_size() + 4 for p in parameters)


def paged_adamw_32bit(parameters: Sequence[Tensor]) -> int:
    """Bytes of bitsandbytes' 32-bit AdamW: two moments in ``float32`` whatever the parameter's dtype."""
    return sum(8 * p.numel() for p in parameters)


COUNTERS: dict[str, Counter] = {
    "paged_adamw_8bit": paged_adamw_8bit,
    "adamw": adamw,
    "paged_adamw_32bit": paged_adamw_32bit,
}


_COPIES_ON_CPU = 5
"""``float32`` copies of what it updates that bitsandbytes 0.50 makes without a kernel, besides a cast of the weight."""


def step_workspace(optimizer: str, parameters: Iterable[Tensor], device: str) -> int:
    """Bytes an update takes on top: ours lays parameters and gradients side by side, the others work in place.

    Small parameters are joined, up to a limit that depends on the device; torch's AdamW is as with ``fused=True``.
    """
    if optimizer != "paged_adamw_8bit":
        return 0
    most, parameters = joining(torch.device(device)), list(parameters)
    joined = [p for p in parameters if p.numel() < most.alone_from]
    size = max((p.element_size() for p in joined), default=0)
    elements = min(sum(padded(p.numel()) for p in joined), most.limit)
    alone = [_within_update(p.numel(), p.element_size(), device) for p in parameters if p.numel() >= most.alone_from]
    return max(2 * size * elements + _within_update(elements, size, device), *alone, 0)


def _within_update(elements: int, size: int, device: str) -> int:
    return 0 if device == "cuda" else 4 * elements * (_COPIES_ON_CPU + (size < 4))
