"""The paged 8-bit AdamW in the place of ``torch.optim.Adam`` and ``AdamW``."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor, nn
from torch.optim import Optimizer

from lightning_lora.optim.flat_adamw import FlatPagedAdamW8bit
from lightning_lora.optim.takeover import groups_of, with_hooks_of


@dataclass(frozen=True, kw_only=True)
class PagedAdamW8bit:
    """AdamW whose moments are in 8 bits and, on CUDA, paged; see :class:`FlatPagedAdamW8bit`."""

    name: ClassVar[str] = "paged_adamw_8bit"

    def build(self, optimizer: Optimizer, model: nn.Module, names: Mapping[Tensor, str]) -> FlatPagedAdamW8bit:
        """Return it over the parameter groups of ``optimizer``; see :class:`lightning_lora.optim.swaps.Swap`."""
        return paged_adamw_8bit(optimizer, names)


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
    groups = groups_of(optimizer, "the paged 8-bit AdamW")
    return with_hooks_of(optimizer, FlatPagedAdamW8bit(groups, names=names))
