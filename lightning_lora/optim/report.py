"""How much of an optimizer's state is really in 8 bits and really paged, and how many bytes it takes.

Our paged 8-bit AdamW keeps the moments of a group in one buffer, which is paged on CUDA from 100,000 elements on. That
of bitsandbytes, which a user may have chosen, pages parameter by parameter: a LoRA factor of rank 16 over 4096 features
has 65,536 elements and is never paged, whatever the class is called.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.optim import Optimizer

from lightning_lora.optim.flat_adamw import FlatPagedAdamW8bit
from lightning_lora.optim.moments import MIN_8BIT, MIN_PAGED, Moments, Moments8bit, is_paged, padded
from lightning_lora.optim.runs import in_order


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
    """Describe ``optimizer``: from its actual state once it has stepped, before that from the rules of its class."""
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    kinds = list(_flat(optimizer) if isinstance(optimizer, FlatPagedAdamW8bit) else _each(optimizer))
    return OptimizerReport(
        name=class_name(optimizer),
        tensors=len(parameters),
        elements=sum(p.numel() for p in parameters),
        in_8bit=sum(in_8bit for in_8bit, _ in kinds),
        paged=sum(paged for _, paged in kinds),
        state_bytes=sum(tensor.numel() * tensor.element_size() for tensor in state_tensors(optimizer)),
    )


def class_name(optimizer: Optimizer) -> str:
    """Class of an optimizer with the package it comes from: ``lightning_lora.optim.FlatPagedAdamW8bit``."""
    return f"{type(optimizer).__module__.partition('.')[0]}.optim.{type(optimizer).__name__}"


def _flat(optimizer: FlatPagedAdamW8bit) -> Iterator[tuple[bool, bool]]:
    """For each parameter of ours, whether its moments are in 8 bits and whether they are paged."""
    for group in optimizer.param_groups:
        settled = [p for p in group["params"] if p in optimizer.state]
        for moments in (optimizer.state[p].moments for p in settled):
            yield isinstance(moments, Moments8bit), moments.paged
        for members in in_order([p for p in group["params"] if p not in optimizer.state]):
            kind, paged = Moments.of(members[0]), is_paged(sum(padded(p.numel()) for p in members), members[0].device)
            yield from [(kind is Moments8bit, paged)] * len(members)


def _each(optimizer: Optimizer) -> Iterator[tuple[bool, bool]]:
    """The same for an optimizer that keeps the moments of each parameter by themselves."""
    eight_bit = type(optimizer).__module__.startswith("bitsandbytes") and "8bit" in type(optimizer).__name__
    pages = bool(getattr(optimizer, "is_paged", False))
    for parameter in (p for group in optimizer.param_groups for p in group["params"]):
        state = optimizer.state.get(parameter, {})
        moments = [s for s in state.values() if isinstance(s, Tensor) and s.shape == parameter.shape]
        if moments:
            in_8bit = all(moment.dtype == torch.uint8 for moment in moments)
            yield in_8bit, all(getattr(moment, "is_paged", False) for moment in moments)
        else:
            is_large = parameter.numel() >= MIN_8BIT
            yield eight_bit and is_large, pages and parameter.is_cuda and parameter.numel() >= MIN_PAGED


def state_tensors(optimizer: Optimizer) -> Iterator[Tensor]:
    """State tensors, each once: bitsandbytes' code tables are shared by all parameters."""
    if isinstance(optimizer, FlatPagedAdamW8bit):
        yield from (tensor for moments in optimizer.moments() for tensor in moments.tensors.values())
    else:
        states = (state.values() for state in optimizer.state.values())
        yield from {id(s): s for values in states for s in values if isinstance(s, Tensor)}.values()
