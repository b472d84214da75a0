"""How much of an optimizer's state is really in 8 bits and really paged, and how many bytes it takes.

bitsandbytes keeps moments in 8 bits only for parameters of at least 4096 elements and pages only buffers of at least
100,000 elements on CUDA. A LoRA factor of rank 16 over 4096 features has 65,536: it is 8-bit and never paged, whatever
the class is called.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.optim import Optimizer

MIN_8BIT = 4096
MIN_PAGED = 100_000


@dataclass(frozen=True)
class OptimizerReport:
    """Counts over the parameters of one optimizer.

    Attributes:
        name: Class of the optimizer, with the package it comes from.
        tensors: Parameters it holds.
        elements: Their elements.
        in_8bit: Parameters whose moments are in 8 bits.
        paged: Parameters whose moments are in paged memory, which the GPU may evict to the host.
        state_bytes: Bytes of its state; 0 before the first step, when nothing is allocated yet.
    """

    name: str
    tensors: int
    elements: int
    in_8bit: int
    paged: int
    state_bytes: int

    def __str__(self) -> str:
        size = f", {self.state_bytes:,} bytes of state" if self.state_bytes else ""
        moments = f"moments of {self.in_8bit} of {self.tensors} tensors in 8 bits, of {self.paged} paged"
        return f"{self.name}: {self.elements:,} parameters, {moments}{size}"


def optimizer_report(optimizer: Optimizer) -> OptimizerReport:
    """Describe ``optimizer``: from its actual state once it has stepped, before that from bitsandbytes' rules."""
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    eight_bit = type(optimizer).__module__.startswith("bitsandbytes") and "8bit" in type(optimizer).__name__
    in_8bit = paged = 0
    for parameter in parameters:
        moments = [
            s
            for s in optimizer.state.get(parameter, {}).values()
            if isinstance(s, Tensor) and s.shape == parameter.shape
        ]
        if moments:
            in_8bit += all(moment.dtype == torch.uint8 for moment in moments)
            paged += all(getattr(moment, "is_paged", False) for moment in moments)
        else:
            in_8bit += eight_bit and parameter.numel() >= MIN_8BIT
            paged += (
                bool(getattr(optimizer, "is_paged", False)) and parameter.is_cuda and parameter.numel() >= MIN_PAGED
            )
    return OptimizerReport(
        name=class_name(optimizer),
        tensors=len(parameters),
        elements=sum(p.numel() for p in parameters),
        in_8bit=in_8bit,
        paged=paged,
        state_bytes=sum(tensor.numel() * tensor.element_size() for tensor in _distinct(optimizer)),
    )


def class_name(optimizer: Optimizer) -> str:
    """Class of an optimizer with the package it comes from: ``bitsandbytes.optim.PagedAdamW8bit``."""
    return f"{type(optimizer).__module__.partition('.')[0]}.optim.{type(optimizer).__name__}"


def _distinct(optimizer: Optimizer) -> Iterator[Tensor]:
    """State tensors, each once: the 8-bit code tables are shared by all parameters."""
    tensors = {id(s): s for state in optimizer.state.values() for s in state.values() if isinstance(s, Tensor)}
    yield from tensors.values()
