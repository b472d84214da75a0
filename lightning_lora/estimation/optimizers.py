"""What an optimizer keeps for each parameter, and what it needs while it makes a step. Counted, not run."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence

import torch
from torch import Tensor

from lightning_lora.optim.badam import BAdam
from lightning_lora.optim.galore_adamw import GaLore
from lightning_lora.optim.moments import Moments, padded
from lightning_lora.optim.runs import joining

UpdateRule = str | GaLore | BAdam
Counter = Callable[[Sequence[Tensor]], int]

_STEP = 4
"""Bytes of the count of steps that torch's AdamW keeps for each parameter."""


def paged_adamw_8bit(parameters: Sequence[Tensor]) -> int:
    """Bytes of :class:`lightning_lora.optim.flat_adamw.FlatPagedAdamW8bit`: small parameters are in 32 bits.

    Args:
        parameters: What it trains.
    """
    buffers = ((padded(p.numel()), each) for p in parameters for each in Moments.of(p).per_element.values())
    return sum(elements // per * dtype.itemsize for elements, (per, dtype) in buffers)


def adamw(parameters: Sequence[Tensor]) -> int:
    """Bytes of ``torch.optim.AdamW``: two moments in the parameter's dtype, and a ``float32`` that counts the steps."""
    return sum(2 * p.numel() * p.element_size() + _STEP for p in parameters)


def paged_adamw_32bit(parameters: Sequence[Tensor]) -> int:
    """Bytes of bitsandbytes' 32-bit AdamW: two moments in ``float32`` whatever the parameter's dtype."""
    return sum(8 * p.numel() for p in parameters)


COUNTERS: dict[str, Counter] = {
    "paged_adamw_8bit": paged_adamw_8bit,
    "adamw": adamw,
    "paged_adamw_32bit": paged_adamw_32bit,
}


def galore_adamw(parameters: Sequence[Tensor], config: GaLore) -> int:
    """Bytes of GaLore: ``M R + 2 R N`` elements for a matrix ``(M, N)`` with ``M <= N`` (arXiv 2403.03507, table 1).

    They are of the parameter's dtype. What is not projected has two moments; each parameter counts its steps.
    """
    return sum(_galore_elements(p, config) * p.element_size() + _STEP for p in parameters)


def badam(parameters: Sequence[Tensor]) -> int:
    """Bytes of BAdam for the parameters of one block: two moments and, in half precision, a copy, in ``float32``.

    With the gradient in ``float32`` that the paper keeps, these are its 16 bytes per parameter (arXiv 2404.02827,
    section 2.2); here the gradient is cast one parameter at a time.
    """
    return sum((8 if _is_wide(p) else 12) * p.numel() * _widening(p) + _STEP for p in parameters)


def state_bytes(rule: UpdateRule, parameters: Sequence[Tensor]) -> int:
    """Bytes that an optimizer keeps for the parameters that it trains at a time."""
    if isinstance(rule, GaLore):
        return galore_adamw(parameters, rule)
    return badam(parameters) if isinstance(rule, BAdam) else COUNTERS[rule](parameters)


_COPIES_ON_CPU = 5
"""``float32`` copies of what it updates that bitsandbytes 0.50 makes without a kernel, besides a cast of the weight."""


def step_workspace(rule: UpdateRule, parameters: Iterable[Tensor], device: str) -> int:
    """Bytes an update takes on top: ours lays parameters and gradients side by side, the others work in place.

    Small parameters are joined, up to a limit that depends on the device; torch's AdamW is as with ``fused=True``.
    """
    parameters = list(parameters)
    if isinstance(rule, GaLore):
        return max((_galore_workspace(p, rule) for p in parameters), default=0)
    if isinstance(rule, BAdam):  # the cast of the gradient, and what AdamW divides by
        return max((p.numel() * (4 if _is_wide(p) else 8) * _widening(p) for p in parameters), default=0)
    return _paged_workspace(parameters, device) if rule == "paged_adamw_8bit" else 0


def _paged_workspace(parameters: Sequence[Tensor], device: str) -> int:
    most = joining(torch.device(device))
    joined = [p for p in parameters if p.numel() < most.alone_from]
    size = max((p.element_size() for p in joined), default=0)
    elements = min(sum(padded(p.numel()) for p in joined), most.limit)
    alone = [_within_update(p.numel(), p.element_size(), device) for p in parameters if p.numel() >= most.alone_from]
    return max(2 * size * elements + _within_update(elements, size, device), *alone, 0)


def _within_update(elements: int, size: int, device: str) -> int:
    return 0 if device == "cuda" else 4 * elements * (_COPIES_ON_CPU + (size < 4))


def _galore_elements(parameter: Tensor, config: GaLore) -> int:
    if not config.projects(parameter):
        return 2 * parameter.numel()
    less, more = sorted(parameter.shape)
    return less * config.rank + 2 * config.rank * more


def _galore_workspace(parameter: Tensor, config: GaLore) -> int:
    """While directions are found: the scaled gradient, its absolute values or square, eigenvectors and their copy."""
    size = parameter.element_size()
    if not config.projects(parameter):
        return parameter.numel() * size
    less, more = sorted(parameter.shape)
    wide = max(size, 4)
    cast = 0 if size == wide else wide * less * more
    finding = cast + wide * (less * more + max(less * more, 3 * less * less))
    return max(finding, size * 3 * config.rank * more)


def _is_wide(parameter: Tensor) -> bool:
    return parameter.element_size() >= 4


def _widening(parameter: Tensor) -> int:
    """``float64`` is not narrowed."""
    return max(parameter.element_size() // 4, 1)
